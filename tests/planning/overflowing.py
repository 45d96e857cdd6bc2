"""Steps that are too large for the devices they are compiled for."""

import dataclasses

import jax

from easylm.config import from_config_dict, load
from easylm.models.llama.presets import PRESETS
from easylm.planning.advice import advice
from easylm.planning.overflow import Overflow, read_overflow
from easylm.planning.target import target_devices
from easylm.planning.topology import parse_topology
from easylm.sharding import make_mesh
from easylm.trainers.build import Program, build
from easylm.trainers.config import SftConfig
from easylm.trainers.sft import sft_objective

CONFIG = from_config_dict(SftConfig, load("sft/tulu2_7b").config)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of LLaMA 2 7B with few layers."""

    topology: str = "v3-8"
    mesh: str = "1,2,4"
    rows: int = 256
    seq_len: int = 512
    num_hidden_layers: int = 4
    remat: str = "none"
    micro_batches: int = 1
    loss_chunk: int = 512
    mu_dtype: str = "float32"

    @property
    def config(self) -> SftConfig:
        """The config that says so."""
        return dataclasses.replace(
            CONFIG,
            mesh=self.mesh,
            remat=self.remat,
            micro_batches=self.micro_batches,
            loss_chunk=self.loss_chunk,
            data=dataclasses.replace(CONFIG.data, seq_len=self.seq_len),
            optimizer=dataclasses.replace(CONFIG.optimizer, mu_dtype=self.mu_dtype),
        )

    def overflow(self) -> Overflow:
        """What the compiler says of it."""
        return read_overflow(self.lowered())

    def lowered(self) -> jax.stages.Lowered:
        """The step, ready to be compiled."""
        program = self.program()
        return program.jitted().lower(program.state, program.batch)

    def program(self) -> Program:
        """The step, not compiled."""
        objective = sft_objective(self.config, self.rows)
        return build(
            self.config,
            model=self.model,
            mesh=self._mesh,
            loss_fn=objective.loss_fn,
            batch=objective.batch,
            total_steps=100,
        )

    def advice(self, overflow: Overflow) -> list[str]:
        """What to change in it."""
        return advice(
            self.config,
            self.model,
            dict(self._mesh.shape),
            overflow,
            rows=self.rows,
            topology=parse_topology(self.topology),
        )

    @property
    def model(self):
        """Its sizes."""
        preset = PRESETS["llama2_7b"]
        return dataclasses.replace(preset, num_hidden_layers=self.num_hidden_layers)

    @property
    def _mesh(self):
        return make_mesh(self.mesh, target_devices(parse_topology(self.topology)))
