"""What a recipe holds, and what a row of one will cost on one 80 GB card.

Hours are predicted, not measured, and a bound from above: they take every prompt and every completion at full
length. The model of time is arithmetic with the speeds of a H100:

    sample    of our own sampler in a CUDA graph: for every position LAUNCH seconds per layer, and the weights
              and the cache read once, at BANDWIDTH
    score     a forward pass of the student and of a teacher, at FORWARD flops per second
    update    three forward passes' worth, four with --gradient_checkpointing, at BACKWARD
"""
from dataclasses import dataclass, field

from methods import METHODS


@dataclass(frozen=True)
class Recipe:
    """The data of a recipe. In every string {seed} is the number of the seed, {dir} its folder, OUT/seed0.

    Usually a row of the report is a row of the recipe. Where two students are compared, `table` says which
    runs a row of the report is made of: {title: the run of both students, or student 1's and student 2's}.
    Every column is there for each student then, and the first row is where the students start.
    """
    about: str
    prepare: list                   # the arguments of `python -m` that write the data of a seed; []: none
    common: dict                    # the flags of every row
    rows: dict                      # {name: flags}; a row may start from an earlier row's {dir}/NAME/final
    columns: dict                   # {evaluation set: its heading}
    axes: dict                      # of the picture, x then y: {title: evaluation sets, which are averaged}
    references: tuple               # the rows that are teachers, not results
    quick: dict                     # {row: flags that --quick replaces}; "" stands for every other row
    quick_prepare: list = field(default_factory=list)       # further arguments of `prepare` with --quick
    # {"full" or "quick": {row: [(mean, spread), ..]}}, in %, of the columns and then of those `elsewhere`; a
    # row that is not in the recipe is one of the paper's that is shown without being run.
    expected: dict = field(default_factory=dict)
    expected_label: str = "expected"                # what these numbers are called where they are printed
    expected_seeds: int = 0         # of how many seeds the full form's numbers are; 0: they are a paper's
    pictured: tuple = ()            # the rows of the picture; (): all
    differences: dict = field(default_factory=dict)         # {title: (row, the row that it is compared with)}
    table: dict = field(default_factory=dict)
    spent: bool = False             # the table also says what a row spent, the picture shows every seed's end
    ends: dict = field(default_factory=dict)    # further columns, means of a row's last tenth of steps:
                                                # {statistic of metrics.jsonl: (its heading, factor)}
    second: tuple = ()              # rows with two students, of whom the second is compared
    elsewhere: dict = field(default_factory=dict)   # {a paper's column that is not measured here: its needs}
    deviations: tuple = ()          # from the paper: what was changed, and why
    lengths: tuple = ()             # tokens of a prompt and a solution that costs are predicted for; (): no
    evaluated: int = 0              # evaluation prompts of all sets together
    gib: dict = field(default_factory=dict)         # {row: GiB at its peak}, predicted by opd.py --dry_run


# ---- the cost ----------------------------------------------------------------------------------------------

LAUNCH = 60 * 1.9e-6                # a layer's small kernels, s
BANDWIDTH = 0.75 * 3.0e12           # bytes/s
FORWARD, BACKWARD = 320e12, 170e12  # flops/s


@dataclass(frozen=True)
class Shape:
    """The shape of a public model."""
    parameters: float
    layers: int
    width: int                      # of all query heads together
    cache: int                      # bytes of keys and values per token, bfloat16


SHAPES = {
    "Qwen/Qwen3-8B": Shape(8.19e9, 36, 4096, 147456),
    "Intelligent-Internet/II-Medical-8B": Shape(8.19e9, 36, 4096, 147456),
    "Qwen/Qwen3-4B-Instruct-2507": Shape(4.02e9, 36, 4096, 147456),
    "Qwen/Qwen3-1.7B": Shape(1.72e9, 28, 2048, 114688),
    "Qwen/Qwen2-7B-Instruct": Shape(7.62e9, 28, 3584, 57344),
    "Qwen/Qwen2-0.5B-Instruct": Shape(0.494e9, 24, 896, 12288),
}


def public(recipe, path):
    """Return the public model that a path is or descends from: {dir}/NAME/final is row NAME's student."""
    while path.startswith("{dir}/"):
        path = models(recipe.rows[path.split("/")[1]], "student")[0]
    return path


def models(flags, flag):
    """Return the paths of --student or --teachers, without their branches."""
    values = flags.get(flag, [])
    return [path.rpartition("=")[2] for path in ([values] if isinstance(values, str) else values)]


def hours(recipe, row):
    """Return the hours of a row on a H100, a bound from above; None where `lengths` are not known."""
    if not recipe.lengths:
        return None
    flags = recipe.common | recipe.rows[row]
    shapes = {flag: [SHAPES[public(recipe, path)] for path in models(flags, flag)]
              for flag in ("student", "teachers")}
    prompt, solution = recipe.lengths
    student, method, longest = shapes["student"][0], METHODS[flags["method"]], flags["max_new_tokens"]
    completion = longest if method.samples else solution
    count = flags["batch"] * flags.get("rollouts", method.defaults.get("rollouts", 1))
    tokens = count * (prompt + completion)
    readers = [student, max(shapes["teachers"] or [student], key=lambda shape: shape.parameters)]
    scored = method.teachers != "none" or "self_teacher" in method.defaults
    passes = 4 if "gradient_checkpointing" in flags else 3
    step = passes * tokens * per_token(student, prompt + completion) / BACKWARD
    step += scored * sum(tokens * per_token(shape, prompt + completion) for shape in readers) / FORWARD
    written = (longest if method.samples else 0) + flags.get("feedback_tokens", 0)
    step += written_in(student, count, written, prompt + longest, flags["sample_batch"])
    steps = flags["steps"] * len(shapes["student"])
    times = 2 + (steps - 1) // flags["eval_every"] if flags.get("eval_every") else 2
    answers = times * recipe.evaluated * flags.get("eval_rollouts", 1) * len(shapes["student"])
    return (steps * step + written_in(student, answers, longest, prompt + longest,
                                      flags["sample_batch"])) / 3600


def per_token(shape, length):
    """Return the flops of a forward pass per token: the weights, and attention over half the length."""
    return 2 * shape.parameters + 2 * shape.layers * shape.width * length


def written_in(shape, count, tokens, length, rows):
    """Return the seconds in which `count` completions are written, `rows` at a time."""
    rows = min(count, rows)
    read = 2 * shape.parameters + rows * length * shape.cache
    return rows and count * tokens / rows * (shape.layers * LAUNCH + read / BANDWIDTH)
