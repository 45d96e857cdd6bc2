"""The shape of a LLaMA: Hugging Face's field names, read from and written to its config.json."""

import dataclasses
import sys

from easylm.errors import InputError

ROPE_TYPES = ("linear", "llama3", "dynamic")
ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the length a model was pretrained on.

    `linear` divides every angle by `factor`; `llama3` divides only the slow frequencies
    (Llama 3.1); `dynamic` raises the base with the length of the text at hand (NTK-aware),
    which has no meaning for packed rows, so training refuses it.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one LLaMA; every field means what it means in Hugging Face."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads: found {self.num_attention_heads}; wanted a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim: found {self.head_dim}; wanted an even number (RoPE)")

    @classmethod
    def from_hf(cls, hf: dict, where: str) -> "LlamaConfig":
        """Reads a Hugging Face config.json, in the spelling of transformers 4 or 5.

        Args:
          hf: the parsed config.json.
          where: its path, for messages.
        Raises:
          InputError: another architecture, an unsupported activation or rope type, or a
            missing or wrong field.
        """
        model_type = hf.get("model_type")
        if model_type != "llama":
            raise InputError(
                f"{where}: model_type: found {model_type!r} (architectures "
                f"{hf.get('architectures')}); wanted 'llama', the one architecture supported "
                "(LLaMA 1, LLaMA 2, Code Llama, Llama 3 and models of their shape)"
            )
        if hf.get("hidden_act", "silu") != "silu":
            raise InputError(f"{where}: hidden_act: found {hf['hidden_act']!r}; wanted 'silu'")
        _require_whole_rotary(hf, where)
        _require_whole_rotary(_section(hf, "rope_parameters", where), f"{where}: rope_parameters")
        for name in ("torch_dtype", "dtype"):
            if not isinstance(hf.get(name), str | None):
                raise InputError(f"{where}: {name}: found {hf[name]!r}; wanted text or null")
        heads = _number(hf, "num_attention_heads", int, where)
        hidden_size = _number(hf, "hidden_size", int, where)
        fields = {
            "vocab_size": _number(hf, "vocab_size", int, where),
            "hidden_size": hidden_size,
            "intermediate_size": _number(hf, "intermediate_size", int, where),
            "num_hidden_layers": _number(hf, "num_hidden_layers", int, where),
            "num_attention_heads": heads,
            "num_key_value_heads": _number(hf, "num_key_value_heads", int, where, heads),
            "head_dim": _number(hf, "head_dim", int, where, hidden_size // heads),
            "max_position_embeddings": _number(hf, "max_position_embeddings", int, where, 2048),
            "rms_norm_eps": _number(hf, "rms_norm_eps", float, where, 1e-6),
            "rope_theta": _rope_theta(hf, where),
            "rope_scaling": _rope_scaling(hf, where),
            "tie_word_embeddings": _switch(hf, "tie_word_embeddings", where),
            "attention_bias": _switch(hf, "attention_bias", where),
            "mlp_bias": _switch(hf, "mlp_bias", where),
            "initializer_range": _number(hf, "initializer_range", float, where, 0.02),
            "bos_token_id": _token_id(hf, "bos_token_id", where, 1),
            "eos_token_id": _token_id(hf, "eos_token_id", where, 2),
            "pad_token_id": _token_id(hf, "pad_token_id", where, None),
        }
        try:
            return cls(**fields)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def to_hf(self, dtype: str) -> dict:
        """The config.json of this model, understood by transformers 4 and 5 alike.

        Args:
          dtype: of the weights beside it, "float32" or "bfloat16".
        """
        scaling = self.rope_scaling and {
            name: value
            for name, value in dataclasses.asdict(self.rope_scaling).items()
            if value is not None
        }
        rope_parameters = {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}
        eos = self.eos_token_id
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "dtype": dtype,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "pretraining_tp": 1,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope_parameters,
            "rope_scaling": scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


def _number(hf: dict, name: str, kind: type, where: str, default: int | float | None = None):
    value = hf.get(name)
    if value is None:
        value = default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Python reads 1e400 as infinity and NaN as it stands; neither converts to an int. Beyond 31
    # bits, sizes overflow in numpy and jax.
    largest = 2**31 - 1 if kind is int else sys.float_info.max
    if not is_number or not 0 < value <= largest or value != kind(value):
        bits = " of 31 bits" if kind is int and is_number and value > largest else ""
        raise InputError(
            f"{where}: {name}: found {value!r}; wanted a positive {kind.__name__}{bits}"
        )
    return kind(value)


def _switch(hf: dict, name: str, where: str) -> bool:
    value = hf.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{where}: {name}: found {value!r}; wanted true, false or null")
    return bool(value)


def _section(hf: dict, name: str, where: str) -> dict:
    value = hf.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name}: found {value!r}; wanted an object or null")
    return value


def _token_id(hf: dict, name: str, where: str, default: int | None):
    """An id, several (as a tuple), or None."""
    value = hf.get(name, default)
    ids = value if isinstance(value, list) else [value]
    is_id = [isinstance(i, int) and not isinstance(i, bool) for i in ids]
    if value is not None and (not ids or not all(is_id)):
        raise InputError(f"{where}: {name}: found {value!r}; wanted an id, a list of ids, or null")
    return tuple(value) if isinstance(value, list) else value


def _rope_theta(hf: dict, where: str) -> float:
    # transformers 5 moved it into rope_parameters; files of both kinds are about, and some
    # carry both spellings.
    spellings = {
        _number(place, "rope_theta", float, where)
        for place in (hf, _section(hf, "rope_parameters", where))
        if place.get("rope_theta") is not None
    }
    if len(spellings) > 1:
        raise InputError(
            f"{where}: rope_theta: found {sorted(spellings)} in rope_theta and rope_parameters; "
            "wanted one value"
        )
    return spellings.pop() if spellings else 10000.0


def _require_whole_rotary(section: dict, where: str) -> None:
    factor = _number(section, "partial_rotary_factor", float, where, 1.0)
    if factor != 1:
        raise InputError(
            f"{where}: partial_rotary_factor: found {factor}; wanted 1, RoPE on the whole head"
        )


def _rope_scaling(hf: dict, where: str) -> RopeScaling | None:
    # A section that is empty, null or holds theta alone leaves it to the other.
    said = {
        name: _scaling_in(section, f"{where}: {name}")
        for name in ("rope_scaling", "rope_parameters")
        if {"rope_type", "type", "factor"} & (section := _section(hf, name, where)).keys()
    }
    first, *others = said.values() or [None]
    if others and others != [first]:
        found = "; ".join(f"{name}: found {scaling or 'default'}" for name, scaling in said.items())
        raise InputError(f"{where}: {found}; wanted both the same, or one of them")
    return first


def _scaling_in(section: dict, where: str) -> RopeScaling | None:
    rope_type = section.get("rope_type", section.get("type"))
    if section.get("type", rope_type) != rope_type:
        raise InputError(
            f"{where}: found type {section['type']!r} and rope_type {rope_type!r}; wanted one"
        )
    if rope_type == "default":
        return None
    if rope_type not in ROPE_TYPES:
        raise InputError(f"{where}.rope_type: found {rope_type!r}; wanted one of {ROPE_TYPES}")
    values = {name: _number(section, name, float, where) for name in ROPE_FIELDS[rope_type]}
    if rope_type == "llama3":
        values["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
    return RopeScaling(rope_type, **values)
