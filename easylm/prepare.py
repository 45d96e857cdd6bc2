"""Data alone: checks every row, encodes them, counts, and draws their lengths.

python -m easylm.prepare --config=sft/quickstart [--workdir=DIR] [--config.FIELD=VALUE ...]

The config is one of easylm.sft or easylm.dpo. What is prepared is kept in data.cache; training with
the same data starts from there. Without --workdir, the counts and the picture go there too.
"""

import dataclasses
import tempfile
from collections.abc import Sequence

from easylm.command import run_command, say
from easylm.command_line import choose_class, parse_command_line
from easylm.config import write_json
from easylm.data.manifest import Manifest
from easylm.data.pack import pack
from easylm.data.pair_rows import PAIRS
from easylm.data.prepare import Prepared, PreparedPairs
from easylm.data.rows import CONVERSATIONS
from easylm.start import (
    model_config,
    open_data,
    open_tokenizer,
    open_weights,
    place_cache,
    prepare_data,
    prepare_preferences,
)
from easylm.trainers.config import DpoConfig, SftConfig
from easylm.workdir import has_checkpoints

# For each kind of run, what its rows are, and how they are prepared.
_KINDS = {SftConfig: (CONVERSATIONS, prepare_data), DpoConfig: (PAIRS, prepare_preferences)}


@dataclasses.dataclass(frozen=True)
class Description:
    """What is written beside the picture.

    Attributes:
      manifest: of the prepared data.
      packed_rows: rows of seq_len that hold one epoch.
      packed_fill: the share of them that is tokens and not padding.
      padded_fill: the same with one example, or pair, in each row.
    """

    manifest: Manifest
    packed_rows: int
    packed_fill: float
    padded_fill: float


def main(argv: Sequence[str]) -> None:
    """Prepares the data of a config and says what it is like."""
    program, kind = "python -m easylm.prepare", choose_class(argv, list(_KINDS))
    config, workdir = parse_command_line(argv, kind, program, __doc__, workdir_required=False)
    workdir, config = workdir.rstrip("/"), place_cache(config, "")
    form, prepare = _KINDS[kind]
    rows = open_data(config, form)
    going_on = bool(workdir) and has_checkpoints(workdir)  # of a run, whose tokenizer stays
    weights = open_weights(config, workdir if going_on else "")
    with tempfile.TemporaryDirectory() as scratch:
        folder = workdir or scratch  # keeps a tokenizer that is trained on the data
        tokenizer = open_tokenizer(config, folder, rows["data"], weights, going_on=going_on)
    model = model_config(config, weights, tokenizer)
    for name in rows:
        prepared = prepare(config, rows[name], tokenizer, model)
        describe(prepared, config.seed, workdir or prepared.folder, name)


def describe(prepared: Prepared | PreparedPairs, seed: int, folder: str, name: str) -> None:
    """Says how full rows are, and writes FOLDER/NAME.json and FOLDER/plots/NAME_lengths.png."""
    from easylm.plots import plot_lengths  # matplotlib, which --help does without

    lengths, seq_len = prepared.lengths, prepared.manifest.seq_len
    noun = prepared.manifest.noun
    tokens = int(lengths.sum())
    rows = len(pack(lengths, seq_len, seed, epoch=0))
    description = Description(
        manifest=prepared.manifest,
        packed_rows=rows,
        packed_fill=tokens / (rows * seq_len),
        padded_fill=tokens / (len(lengths) * seq_len),
    )
    say(
        f"packed: {rows:,} rows of {seq_len:,} tokens, {description.packed_fill:.1%} filled\n"
        f"one {noun} a row: {len(lengths):,} rows, {description.padded_fill:.1%} filled"
    )
    path = f"{folder}/plots/{name}_lengths.png"
    picture = plot_lengths(prepared.row_lengths, seq_len, path, noun)
    write_json(description, f"{folder}/{name}.json")
    say(f"wrote {folder}/{name}.json and {picture}")


if __name__ == "__main__":
    run_command(main)
