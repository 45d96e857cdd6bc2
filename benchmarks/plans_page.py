"""What docs/plan.md says of the plans of benchmarks/plans.py: a table, and what follows from it."""

import textwrap

from benchmarks.process import GB
from easylm.config import load

BEGIN = "<!-- plans: what follows is written by python -m benchmarks.plans -->"
END = "<!-- end of plans -->"
GIB = 2**30
MOST = 0.95  # of what a program may use; the rest is for what no plan knows

# MFU that others have reached with a model of about the size on the slice: no bound may lie below.
PUBLISHED = {
    "sft/tulu2_7b@v3-256 full": (0.473, "Levanter 1.0, 6.7B"),
    "sft/tulu2_13b@v3-256 full": (0.544, "Levanter 1.0, 13B"),
    "sft/tulu1_65b@v3-256 full": (0.446, "Levanter 1.0, 65B"),
    "sft/tulu1_7b@v3-8": (0.08, "EasyLM issue 61, 7B"),
    "sft/tulu2_70b@v6e-64 full": (0.460, "MaxText, Llama 3.1 70B"),
}
PREFERENCES = "dpo/tulu2_70b"
PAPERS_RUN = "took about 7 days on a v3-512"  # arXiv 2311.10702


def in_order(recipe: str) -> tuple:
    """Sorts recipes: SFT before preferences, families together, by the size of the model."""
    folder, _, name = recipe.partition("/")
    family, _, size = name.rpartition("_")
    return folder != "sft", family.removeprefix("code_"), family, int(size.removesuffix("b"))


def placed(text: str, between: str) -> str:
    """A page with what stands between its two markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"found no line {BEGIN!r} and, after it, {END!r}")
    return f"{before}{BEGIN}\n\n{between}\n\n{END}{after}"


def name_of(recipe: str, topology: str, overrides: dict, **_) -> str:
    """A plan's own name; `full` if its batch is no longer the recipe's but fills the slice."""
    return f"{recipe}@{topology}{' full' if 'batch_rows' in overrides else ''}"


def share(made: dict) -> float:
    """Of the memory that a program may use, what the step takes."""
    memory = made["plan"]["memory"]
    return memory["total"] / memory["usable"]


def faults(made: dict) -> list[str]:
    """What is wrong with a plan."""
    plan, found = made["plan"], []
    if not plan["fits"]:
        found.append(f"does not fit: it takes {share(made):.1%} of what a program may use")
    elif share(made) > MOST:
        found.append(f"takes {share(made):.1%} of what a program may use, more than {MOST:.0%}")
    reached, of = PUBLISHED.get(name_of(**made), (0.0, ""))
    if plan["fits"] and plan["estimate"]["mfu_bound"] <= reached:
        bound = plan["estimate"]["mfu_bound"]
        found.append(f"MFU is bound to {bound:.1%}, but {reached:.1%} was reached ({of})")
    return found


def page(results: list[dict]) -> str:
    """What docs/plan.md says: the estimates, the plans, and what it took to make them."""
    as_they_are = [made for made in results if not made["overrides"]]
    changed = sorted(
        (made for made in results if made["overrides"]), key=lambda made: in_order(made["recipe"])
    )
    others = [made for made in changed if "batch_rows" not in made["overrides"]]
    full = [made for made in changed if "batch_rows" in made["overrides"]]
    parts = [
        "GiB are those of a device, the share that of what a program may use there. Times and MFU "
        "are estimates: bounds as explained above, not measurements. A step takes at least the "
        "first time, and the second if nothing is sent while a device computes; MFU (at most) and "
        "the hours of the run (at least) are those of the first.",
        *_table("The recipes as they are, on the pods that they are meant for:", as_they_are),
        *_table("With `--topology` and `--config.mesh`, `micro_batches`, `remat` as here:", others),
        *_table(
            "With batches as large as pre-training has them, to compare with published MFU:", full
        ),
        preference_days([made for made in results if made["recipe"] == PREFERENCES]),
        beside_published(results),
        effort(results),
    ]
    filled = (
        part if part.startswith("|") else textwrap.fill(part, 100, break_on_hyphens=False)
        for part in parts
    )
    return "\n\n".join(part for part in filled if part)


def _table(about: str, results: list[dict]) -> list[str]:
    """The plans as Markdown under a line of text, unless there are none."""
    head = [
        "| recipe | slice | mesh, micro-batches, remat | GiB, share | step s, est. | MFU ≤ | "
        "hours ≥ | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return [about, "\n".join([*head, *map(line, results)])] if results else []


def line(made: dict) -> str:
    """A plan as a line of the table."""
    plan, estimate = made["plan"], made["plan"]["estimate"]
    # What is set beside the options that have a place of their own.
    own = ("mesh", "micro_batches", "remat", "batch_examples")
    beside = [f"{name}={value}" for name, value in made["overrides"].items() if name not in own]
    cells = [
        ", ".join([made["recipe"], *beside]),
        made["topology"],
        f"{','.join(map(str, plan['mesh'].values()))} {plan['micro_batches']} {plan['remat']}",
        f"{plan['memory']['total'] / GIB:.1f} {share(made):.0%}",
    ]
    if not plan["fits"]:
        return f"| {' | '.join(cells)} | does not fit | | | |"
    cells += [
        f"{estimate['step_seconds']:.3g} to {estimate['serial_seconds']:.3g}",
        f"{estimate['mfu_bound']:.0%}",
        f"{estimate['hours']:.{0 if estimate['hours'] >= 10 else 1}f}",
        estimate["bound"],
    ]
    return f"| {' | '.join(cells)} |"


def costs(made: dict) -> str:
    """What it took to make a plan."""
    first, again = made["first"], made["again"]
    return (
        f"{first['seconds']:.1f} s, {made['plan']['compile_seconds']:.1f} s of them compiling, "
        f"{first['peak'] / GB:.1f} GB; again {again['seconds']:.1f} s; "
        f"load {made['load_average']:.1f}"
    )


def preference_days(results: list[dict]) -> str:
    """How long the largest run on preferences takes, beside what it took."""
    fitting = [made for made in results if made["plan"]["fits"]]
    if not fitting:
        return ""
    data, epochs = fitting[0]["plan"]["data"], load(PREFERENCES).config.epochs
    days = sorted(
        (made["plan"]["devices"], made["topology"], made["plan"]["estimate"]["hours"] / 24)
        for made in fitting
    )
    listed = ", ".join(f"{count:.2g} on a {topology}" for _, topology, count in days)
    return (
        f"`{PREFERENCES}` goes {epochs} times over {data['examples']:,} pairs with "
        f"{data['mean_tokens'] / 2:,.0f} tokens a side on average. An estimate of the days that "
        f"its steps take at least: {listed}; the pass of the reference, once over the pairs, comes "
        f"on top. The paper's run {PAPERS_RUN}."
    )


def beside_published(results: list[dict]) -> str:
    """The bounds beside what others have reached."""
    listed = []
    for made in results:
        reached, of = PUBLISHED.get(name_of(**made), (0.0, ""))
        if of and made["plan"]["fits"]:
            bound = made["plan"]["estimate"]["mfu_bound"]
            listed.append(
                f"{made['recipe']} on a {made['topology']} at most {bound:.1%}, and {reached:.1%} "
                f"was reached ({of})"
            )
    if not listed:
        return ""
    return (
        f"MFU that others have published, beside these bounds: {'; '.join(listed)}. The recipes' "
        "own batches are smaller, and leave row groups of so large a slice empty: their bounds "
        "there are lower."
    )


def effort(results: list[dict]) -> str:
    """What it took to make all plans."""
    compiling = [made["plan"]["compile_seconds"] for made in results]
    again = max(made["again"]["seconds"] for made in results)
    peak = max(made["first"]["peak"] for made in results) / GB
    machines = sorted({made["machine"] for made in results})
    software = sorted({_software(made["versions"]) for made in results})
    return (
        f"Each was compiled in {min(compiling):.0f} to {max(compiling):.0f} s, by a process that "
        f"took {peak:.1f} GB or less; asked again, the longest took {again:.0f} s "
        f"({' or '.join(machines)}; {' or '.join(software)}). `python -m benchmarks.plans` makes "
        "them all."
    )


def _software(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
