"""The recipe of a run, for the model card of what it made."""

# By topic; the names are those of the options, so that a card can be typed in again.
_TOPICS = {
    "started from": ("init_from", "model.preset", "seed"),
    "data": (
        "data.sources",
        "data.chat_template",
        "data.eos_newline",
        "data.special_tokens",
        "data.too_long",
        "data.seq_len",
        "data.packing",
    ),
    "amounts": ("epochs", "steps", "batch_examples", "batch_rows"),
    "loss": ("loss_weighting", "loss_group"),
    "preferences": (
        "dpo.loss",
        "dpo.beta",
        "dpo.label_smoothing",
        "dpo.simpo_gamma",
        "dpo.sft_weight",
        "dpo.margin_weight",
        "dpo.reference",
        "dpo.scored_turns",
        "dpo.keep_prompt",
    ),
    "optimizer": (
        "optimizer.name",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
    ),
    "learning rate": (
        "optimizer.learning_rate",
        "optimizer.schedule",
        "optimizer.warmup_steps",
        "optimizer.warmup_ratio",
        "optimizer.decay_ratio",
        "optimizer.final_ratio",
    ),
    "precision": ("param_dtype", "compute_dtype", "optimizer.mu_dtype"),
}
# Options that are read only where another has one of these values.
_READ_WHERE = {
    "loss_group": ("loss_weighting", ("microbatch",)),
    "dpo.label_smoothing": ("dpo.loss", ("sigmoid", "sigmoid_norm", "robust")),
    "dpo.simpo_gamma": ("dpo.loss", ("simpo",)),
    "dpo.margin_weight": ("dpo.loss", ("sigmoid",)),
    "dpo.reference": (
        "dpo.loss",
        ("sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm"),
    ),
    "dpo.keep_prompt": ("data.too_long", ("truncate",)),
    "optimizer.b1": ("optimizer.name", ("adamw", "lion")),
    "optimizer.b2": ("optimizer.name", ("adamw", "lion")),
    "optimizer.mu_dtype": ("optimizer.name", ("adamw", "lion")),
    "optimizer.eps": ("optimizer.name", ("adamw",)),
    "optimizer.warmup_ratio": ("optimizer.warmup_steps", (None,)),
    "optimizer.decay_ratio": ("optimizer.schedule", ("wsd",)),
    "optimizer.final_ratio": ("optimizer.schedule", ("linear", "cosine", "wsd")),
}
_STRIPPED = (
    "\nTrained without the newline tokens after the end of a turn, as Tülu 2 was "
    "(eos_newline=strip). The chat template of this folder writes them, so from the second "
    "turn on inference sees tokens there that training did not. Chats of one turn are the "
    "same; a template without the newline after eos_token gives the ids of training.\n"
)


def model_card(title: str, facts: dict[str, str], run_config: dict | None) -> str:
    """README.md of a Hugging Face folder, with the recipe of the run that trained the model.

    Args:
      title: its heading.
      facts: name -> value, in the order to list them.
      run_config: as `dataclasses.asdict` gives it, of this version or another; None where no run
        is known.
    """
    settings = _flat(run_config or {})
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    for topic, names in _TOPICS.items():
        shown = [_setting(name, settings[name]) for name in names if _is_read(name, settings)]
        if shown:
            lines.append(f"- {topic}: {', '.join(shown)}")
    warning = _STRIPPED if settings.get("data.eos_newline") == "strip" else ""
    return f"# {title}\n\n" + "\n".join(lines) + "\n" + warning


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat


def _is_read(name: str, settings: dict) -> bool:
    other, values = _READ_WHERE.get(name, (name, (settings.get(name),)))
    return settings.get(name) not in (None, "") and settings.get(other) in values


def _setting(name: str, value) -> str:
    shown = f"{value:g}" if isinstance(value, float) else value
    return f"{name.rpartition('.')[2]}={shown}"
