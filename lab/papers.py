"""The papers' tables as recipes: their models, sets and hyperparameters, and their numbers beside ours.

What one card or this project cannot do as the paper did stands in `deviations`. Columns that are not measured
here are shown with what they need, never with a number of ours. No recipe of this file has been run.
"""
from .recipe import Recipe

LORA = dict(lora_rank=64, gradient_checkpointing=True)
NO_THINKING = '{{"enable_thinking": false}}'
JUDGE = "needs an external judge"
ADAPTER = ("LoRA of rank 64 at ten times the paper's learning rate: weights, gradients and AdamW of {} take "
           "{} GB.")


# ---- camopd-*: CaMOPD, 2605.27115 --------------------------------------------------------------------------

FULL = dict(method="camopd", schedule="3:1", mass=[0.8], scale=["general=2"])
TABLE_7 = {                             # CaMOPD's grid; scale and mass are the general branch's
    "schedule-1-1": dict(schedule="1:1"),
    "schedule-5-1": dict(schedule="5:1"),
    **{f"scale-{scale}-mass-{mass}": dict(scale=[f"general={scale}"], mass=[f"general={mass}"])
       for scale, mass in ((1, 0.6), (1, 0.8), (2, 0.6), (3, 0.6), (3, 0.8))}}
# Both scenarios, appendix A.7. Its batch is 512 prompts and its rollouts have up to 32,768 tokens.
RECOVERY = LORA | dict(steps=120, batch=128, lr=2e-5, save_every=20)
RECOVERY_COMMON = dict(seed="{seed}", max_new_tokens=4096, micro_tokens=16384, sample_batch=32)
NEMOTRON = [f"general={count}:nvidia/Nemotron-Post-Training-Dataset-v1:{split}" for split, count in (
    ("chat", 291), ("code", 739), ("math", 797), ("stem", 8052), ("tool_calling", 121))]
RECOVERY_ELSEWHERE = {
    "GPQA-Diamond": f"{JUDGE} (Qwen2.5-14B)", "ZebraLogic": "needs its own checker",
    "LiveCodeBench v5": "needs code to be run", "LiveCodeBench v6": "needs code to be run",
    "Arena-Hard hard prompts": f"{JUDGE} (GPT-4.1)", "Arena-Hard creative": f"{JUDGE} (GPT-4.1)",
    "LiveBench": "needs its own checker"}
RECOVERY_DEVIATIONS = (
    "Batches of 128 prompts instead of 512 and completions of at most 4,096 tokens instead of 32,768: the "
    "paper's runs take 224 hours of a H100 each.",
    "General prompts are drawn from the first 40,000 rows of each of Nemotron's splits, and without the "
    "schemas of tools.",
    "Prompts longer than 16,000 characters are left out; the paper cuts them at 4,096 tokens.",
    "Optimizer, warm-up, weight decay, clipping, temperature and the thresholds of w_t are not given: ours.",
    "All evaluation is greedy; the paper samples HMMT25 16 times at 0.6 and lets Qwen2.5-14B compare "
    "answers, where we compare them by math-verify.",
    "Of its two other baselines Relaxed OPD is not in this project, and of SelecTKD (--token_weight "
    "selectkd) it gives no settings.")


def with_judged(measured, *further):
    """Return a paper's numbers of a row: of the columns that are measured here, then of the others."""
    return [(score, None) for score in (*measured, *further)]


CAMOPD_MEDICAL = Recipe(
    about="CaMOPD's table 2: II-Medical-8B, which was specialised from Qwen3-8B, is to get its general "
          "abilities back and to keep the medical ones. General teacher: Qwen3-8B. Domain teacher and start: "
          "Intelligent-Internet/II-Medical-8B, which is public. 10,000 prompts of each branch: proxy prompts "
          "from Nemotron; MedMCQA 4,000, MedReason 3,000, Medical-R1-Distill-Data 2,000, m23k 1,000. 120 "
          "steps, alternation 3:1, mass 0.8, general scale 2. MedQA and MedXpertQA by the letter behind "
          "'Final answer:', IFEval by its checker. In %.",
    prepare=["data.mix", "{dir}/data", "--seed", "{seed}", *NEMOTRON,
             "domain=4000:openlifescienceai/medmcqa", "domain=3000:UCSC-VLAA/MedReason",
             "domain=2000:FreedomIntelligence/Medical-R1-Distill-Data",
             "domain=1000:UCSC-VLAA/m23k-tokenized"],
    common=RECOVERY_COMMON | dict(eval_prompts=[
        "medqa=GBaker/MedQA-USMLE-4-options:test", "medxpertqa=TsinghuaC3I/MedXpertQA:test",
        "ifeval=google/IFEval", "hmmt25=MathArena/hmmt_feb_2025"]),
    rows={row: RECOVERY | flags | dict(
        student="Intelligent-Internet/II-Medical-8B",
        teachers=["general=Qwen/Qwen3-8B", "domain=Intelligent-Internet/II-Medical-8B"],
        prompts=["general={dir}/data/general.jsonl", "domain={dir}/data/domain.jsonl"])
        for row, flags in (("mopd", dict(method="mopd")), ("camopd", FULL))},
    columns={"medqa": "MedQA (1,273)", "medxpertqa": "MedXpertQA (2,450)", "ifeval": "IFEval (541)",
             "hmmt25": "HMMT25 (30)"},
    axes={"MedQA, %": ("medqa",), "IFEval, %": ("ifeval",)},
    references=(),
    quick={"": dict(steps=8, batch=16, max_new_tokens=1024)},
    expected={"full": {row: with_judged(*scores) for row, scores in {
        "general teacher": ((79.03, 17.22, 84.66, 45.00), 62.50, 84.80, 58.42, 31.43, 24.80, 36.50, 52.10),
        "medical teacher": ((86.17, 22.90, 48.98, 28.33), 62.37, 71.60, 48.75, 27.43, 10.90, 36.40, 34.40),
        "mopd": ((86.02, 23.55, 48.06, 33.96), 60.10, 72.60, 51.25, 24.00, 14.80, 33.00, 42.80),
        "Relaxed OPD": ((85.94, 24.12, 48.61, 32.92), 61.49, 73.20, 53.76, 29.14, 15.40, 34.90, 40.70),
        "SelecTKD": ((85.78, 23.51, 49.17, 33.54), 58.46, 72.10, 54.48, 29.71, 15.20, 35.60, 41.80),
        "camopd": ((85.78, 23.63, 59.89, 34.58), 61.99, 72.60, 56.63, 29.71, 16.40, 31.80, 49.00),
    }.items()}},
    expected_label="paper",
    elsewhere=RECOVERY_ELSEWHERE,
    deviations=(ADAPTER.format("8 B parameters", 131),
                "The paper's MedQA prompt is not given; ours asks for the same last line.",
                *RECOVERY_DEVIATIONS),
    lengths=(1024, 0), evaluated=1273 + 2450 + 541 + 30,
    gib=dict.fromkeys(("mopd", "camopd"), 58.4))

ROLEPLAY = RECOVERY | dict(
    student="{dir}/domain/final",
    teachers=["general=Qwen/Qwen3-4B-Instruct-2507", "domain={dir}/domain/final"],
    prompts=["general={dir}/data/general.jsonl", "domain={dir}/data/domain.jsonl"])
CAMOPD_ROLEPLAY = Recipe(
    about="CaMOPD's tables 1 (role-play), 3 (ablation) and 7 (grid). Qwen3-4B-Instruct-2507, the general "
          "teacher, is first trained on CoSER's conversations (row domain), since the paper's role-play "
          "model is not published; every other row starts from this row, which is also the domain teacher. "
          "10,000 prompts of each branch: proxy prompts from Nemotron, and of CoSER's longest conversations "
          "all but the last answer. The domain's own measure needs a judge, so nothing here says whether "
          "role-play was kept. In %.",
    prepare=["data.mix", "{dir}/data", "--seed", "{seed}", *NEMOTRON, "sft=30000:Neph0s/CoSER:train",
             "domain=10000:Neph0s/CoSER:prompts"],
    common=RECOVERY_COMMON | dict(eval_prompts=["ifeval=google/IFEval", "hmmt25=MathArena/hmmt_feb_2025"]),
    rows={"domain": LORA | dict(student="Qwen/Qwen3-4B-Instruct-2507", prompts=["{dir}/data/sft.jsonl"],
                                method="sft", steps=470, batch=64, lr=1e-4, lr_schedule="cosine", warmup=20,
                                save_every=100),
          "mopd": ROLEPLAY | dict(method="mopd"),
          "mopd-3to1": ROLEPLAY | dict(method="mopd", mixture="3:1"),
          "no-selection": ROLEPLAY | FULL | dict(mass=[1]),
          "camopd": ROLEPLAY | FULL,
          **{row: ROLEPLAY | FULL | flags for row, flags in TABLE_7.items()}},
    columns={"ifeval": "IFEval (541)", "hmmt25": "HMMT25 (30)"},
    axes={"HMMT25, %": ("hmmt25",), "IFEval, %": ("ifeval",)},
    references=("domain",),
    quick={"": dict(steps=8, batch=16, max_new_tokens=1024), "domain": dict(steps=20, max_new_tokens=1024)},
    expected={"full": {row: with_judged(*scores) for row, scores in {
        "general teacher": ((83.18, 33.12), 61.49, 79.50, 34.76, 20.57, 36.50, 65.80, 65.60, 30.92),
        "domain": ((67.65, 26.67), 54.29, 31.50, 25.09, 16.00, 9.70, 4.20, 42.80, 41.08),
        "mopd": ((79.67, 29.17), 61.99, 71.30, 31.54, 22.29, 25.50, 13.70, 58.90, 42.86),
        "Relaxed OPD": ((79.67, 31.25), 63.51, 71.40, 32.26, 22.86, 30.10, 17.30, 59.00, 43.28),
        "SelecTKD": ((78.93, 31.04), 60.98, 70.60, 34.41, 24.00, 27.10, 16.90, 58.90, 41.79),
        "mopd-3to1": ((78.19, 31.04), 61.49, 75.20, 35.13, 21.71, 29.50, 22.10, 60.50, 41.99),
        "no-selection": ((78.00, 27.29), 61.74, 74.70, 35.48, 24.57, 30.20, 25.50, 61.10, 42.60),
        "camopd": ((80.41, 31.04), 62.63, 76.30, 37.28, 24.00, 33.20, 33.30, 63.50, 45.00),
        "schedule-1-1": ((79.48, 31.46), 61.11, 74.10, 37.99, 23.43, 30.60, 27.60, 63.00, 43.93),
        "schedule-5-1": ((79.85, 29.79), 60.23, 76.70, 37.28, 23.43, 35.20, 31.10, 63.20, 43.86),
        "scale-1-mass-0.6": ((78.74, 31.46), 61.87, 74.40, 34.41, 24.00, 27.60, 22.10, 59.70, 44.45),
        "scale-1-mass-0.8": ((78.93, 30.83), 61.62, 74.20, 35.13, 20.57, 26.60, 25.50, 61.40, 44.01),
        "scale-2-mass-0.6": ((80.77, 31.25), 61.62, 74.50, 34.77, 24.00, 32.60, 27.30, 62.70, 44.56),
        "scale-3-mass-0.6": ((79.67, 30.42), 60.98, 74.50, 34.41, 22.29, 30.00, 28.00, 63.00, 44.70),
        "scale-3-mass-0.8": ((80.96, 31.87), 62.50, 75.50, 35.48, 22.86, 29.30, 30.20, 62.30, 44.54),
    }.items()}},
    expected_label="paper",
    elsewhere=RECOVERY_ELSEWHERE | {"role-play": f"{JUDGE} (Qwen2.5-72B)"},
    deviations=(ADAPTER.format("4 B parameters", 64) + " With what a step needs that is too much.",
                "The role-play model learns from 30,000 conversations, one epoch of their last answers; the "
                "paper's from 300,000, with hyperparameters that it does not give.",
                "Of a longest conversation that has more than 16,000 characters an earlier answer is asked "
                "for.",
                *RECOVERY_DEVIATIONS),
    lengths=(2048, 512), evaluated=541 + 30,
    gib={"domain": 38.4} | dict.fromkeys(("mopd", "mopd-3to1", "no-selection", "camopd", *TABLE_7), 45.9))


# ---- veto-gsm8k: Veto, 2601.07155 --------------------------------------------------------------------------

GSM8K = dict(student="Qwen/Qwen2-0.5B-Instruct", prompts=["openai/gsm8k:train[:1000]"], steps=750, batch=4,
             lr=1e-5, lr_schedule="linear", warmup=75, save_every=250)
GSM8K_TAUGHT = GSM8K | dict(teachers=["{dir}/teacher/final"])
GSM8K_SAMPLED = GSM8K_TAUGHT | dict(method="opd", loss="fkl", temperature=0.5, top_p=0.5)
VETO_GSM8K = Recipe(
    about="Veto's GSM8K column: Qwen2-0.5B-Instruct from Qwen2-7B-Instruct, which is first trained on "
          "GSM8K's 7,473 problems (row teacher). The student has 1,000 of them, three epochs in batches of "
          "4, at 1e-5 with linear decay; rollouts at temperature 0.5 and top-p 0.5, up to 768 tokens. veto: "
          "forward KL to q p^beta, beta from 0.8 to 0. Accuracy in % on 1,319 test problems, greedy.",
    prepare=[],
    common=dict(seed="{seed}", eval_prompts=["gsm8k=openai/gsm8k:test"], max_new_tokens=768, sample_batch=128,
                micro_tokens=8192),
    rows={"teacher": LORA | dict(student="Qwen/Qwen2-7B-Instruct", method="sft", prompts=["openai/gsm8k"],
                                 steps=700, batch=32, lr=1e-4, lr_schedule="linear", warmup=70,
                                 save_every=350),
          "sft": GSM8K | dict(method="sft"),
          "kd": GSM8K_TAUGHT | dict(method="kd"),
          "opd": GSM8K_SAMPLED,
          "veto": GSM8K_SAMPLED | dict(target="veto", veto_beta=0.8)},
    columns={"gsm8k": "GSM8K (1,319)"},
    axes={},
    references=("teacher",),
    quick={"": dict(steps=50, max_new_tokens=256)},
    expected={"full": {row: [(score, None)] for row, score in {
        "teacher": 74.7, "sft": 30.7, "kd": 33.4, "opd": 35.1, "SKD": 33.6, "veto": 39.9}.items()}},
    expected_label="paper",
    deviations=("LoRA of rank 64 for the teacher: 7.6 B parameters would take 122 GB. The paper does not "
                "publish its teacher, nor how it was trained.",
                "Our prompt asks for \\boxed{} through the chat template; the paper's is 'Q: .. A:', where "
                "an answer ends at a blank line. So compare the rows with each other.",
                "Answers have up to 768 tokens, the paper's 512. No dropout (the paper: 0.1; its code: "
                "none).",
                "Its code gives the first token of a response no loss, and at its last step beta is not yet "
                "0; ours follows the paper.",
                "SKD is not in this project."),
    lengths=(128, 128), evaluated=1319,
    gib={"teacher": 26.6, "sft": 14.2, "kd": 28.4, "opd": 28.4, "veto": 28.4})


# ---- opsd-1.7b: OPSD, 2601.18734 ---------------------------------------------------------------------------

OPSD_ROW = dict(student="Qwen/Qwen3-1.7B", method="opsd", lora_alpha=128, steps=100, batch=32, lr=2e-4,
                temperature=1.1, top_p=0.95, prompts=["siyanzhao/Openthoughts_math_30k_opsd"], save_every=50,
                teacher_chat_template_kwargs='{{"enable_thinking": true}}', drop_long=True) | LORA
OPSD = Recipe(
    about="OPSD's smallest student: Qwen3-1.7B is its own teacher, which as it started and with thinking on "
          "reads the reference solution of a problem (OpenThoughts' mathematics, at most 30,000, in the "
          "authors' own set) and scores what the student writes without thinking, 1,024 tokens at most. LoRA "
          "of rank 64 and alpha 128, 100 steps of 32 at 2e-4. Rows: the divergence, teacher first in fkl. "
          "Accuracy in %, mean of 12 completions per problem.",
    prepare=[],
    common=dict(seed="{seed}", eval_prompts=[f"{name}={source}" for name, source in (
        ("aime24", "math-ai/aime24"), ("aime25", "math-ai/aime25"), ("hmmt25", "MathArena/hmmt_feb_2025"))],
        eval_rollouts=12, eval_temperature=1.0, eval_top_p=0.95, max_new_tokens=1024, sample_batch=128,
        micro_tokens=16384, chat_template_kwargs=NO_THINKING),
    rows={loss: OPSD_ROW | dict(loss=loss) for loss in ("fkl", "rkl", "jsd")},
    columns={"aime24": "AIME24 (30)", "aime25": "AIME25 (30)", "hmmt25": "HMMT25 (30)"},
    axes={"AIME24, %": ("aime24",), "AIME25, %": ("aime25",)},
    references=(),
    quick={"": dict(steps=10, batch=8)},
    expected={"full": {row: [(score, None) for score in scores] for row, scores in {
        "start, thinking": (51.5, 36.7, 23.1), "fkl": (57.2, 43.9, 29.2), "rkl": (None, 35.0, None),
        "jsd": (None, 39.0, None)}.items()}},
    expected_label="paper, thinking",
    deviations=("Evaluated as it is trained, without thinking and up to 1,024 tokens, since a run has one "
                "template and one length: levels are not the paper's, which evaluates with thinking.",
                "The paper's fkl row is its better checkpoint, after 50 steps; after 100 it has 41.1 on "
                "AIME25. rkl and jsd are its ablation's values after 100 steps.",
                "Entries are clipped at 0.05 in all three rows; which clip the table has is not said. No "
                "top-k of 20 in sampling.",
                "Problems that leave no room for a completion are left out, and counted."),
    lengths=(1024, 0), evaluated=90, gib=dict.fromkeys(("fkl", "rkl", "jsd"), 34.6))


# ---- many-faces: The Many Faces of OPD, 2605.11182 ---------------------------------------------------------

MANY_ROW = dict(student="Qwen/Qwen3-1.7B", teachers=["Qwen/Qwen3-8B"], method="opd", steps=1000, batch=64,
                lr=2e-6, lr_schedule="cosine", warmup=100, weight_decay=0.1, adam_beta2=0.98, top_p=0.95,
                loss="rkl", prompts=["open-r1/DAPO-Math-17k-Processed"], save_every=100, eval_every=100,
                gradient_checkpointing=True)
TRUNCATED = {f"{form}-{k}": dict(support=f"student_{form}", top_k=k)
             for k, forms in ((20, ("raw", "sg", "renorm", "tail")), (5, ("raw", "sg", "renorm")))
             for form in forms} | {"renorm-both-20": dict(support="intersection_renorm", top_k=20)}
MANY_FACES = Recipe(
    about="The Many Faces of OPD on truncated reverse KL: Qwen3-1.7B from Qwen3-8B on DAPO-Math-17k, without "
          "thinking, 1,000 steps of 64 rollouts of up to 4,096 tokens at 2e-6 with cosine decay. Rows: the "
          "full vocabulary, the sampled token, and the student's 20 or 5 most probable tokens as they are "
          "(raw), with the gradient of their mass stopped (sg), renormalised (the paper's default; also of "
          "those that are the teacher's, too) or with the rest as one entry (tail). The paper's raw row with "
          "20 collapses: its share of repeated 3-grams rises from .51 to .998 within 1,000 steps, its "
          "accuracy falls to 0. Accuracy in %, greedy.",
    prepare=[],
    common=dict(seed="{seed}", eval_prompts=["math500=HuggingFaceH4/MATH-500", "aime24=math-ai/aime24",
                                             "aime25=math-ai/aime25"],
                max_new_tokens=4096, sample_batch=48, micro_tokens=8192, chat_template_kwargs=NO_THINKING),
    rows={"full": MANY_ROW, "token": MANY_ROW | dict(loss="pg"),
          **{row: MANY_ROW | flags for row, flags in TRUNCATED.items()}},
    columns={"math500": "MATH-500 (500)", "aime24": "AIME24 (30)", "aime25": "AIME25 (30)"},
    axes={"MATH-500, %": ("math500",), "AIME24, %": ("aime24",)},
    references=(),
    quick={"": dict(steps=50, batch=16, warmup=5, max_new_tokens=1024)},
    expected={"full": {"teacher, 8B": [(83, None), (28, None), (22, None)],
                       "teacher, 1.7B after GRPO": [(82, None), (30, None), (20, None)]}},
    expected_label="paper",
    deviations=("The tokens are chosen at every update, not once at the rollout; with one update per rollout "
                "both are the same.",
                "14,116 English problems of a set without repetitions (open-r1's); the paper's is the "
                "original 17K. The teacher of the paper's last rows, 1.7B after GRPO, is not published.",
                "The paper gives curves for these rows and few numbers, so most rows have none beside."),
    lengths=(256, 0), evaluated=560, gib=dict.fromkeys(("full", "token", *TRUNCATED), 63.9))


# ---- opcod-*: OPCoD's three pairs --------------------------------------------------------------------------

# OPCoD, 2606.14368, table 1: of each pair of domains student 1's two scores and then student 2's, in %.
# Student 1 is stronger in the first domain, student 2 in the second.
PAPER = {
    ("physics", "chemistry"): {"initial": (51.6, 37.3, 48.6, 56.3), "GRPO": (52.6, 55.4, 54.3, 62.8),
                               "SDPO": (51.1, 56.7, 56.4, 69.9), "OPCoD": (54.1, 58.9, 58.8, 70.2)},
    ("chemistry", "material"): {"initial": (56.3, 56.1, 37.6, 65.1), "GRPO": (62.0, 65.6, 57.3, 65.2),
                                "SDPO": (70.9, 65.8, 55.4, 60.0), "OPCoD": (71.3, 69.8, 57.5, 66.4)},
    ("material", "physics"): {"initial": (65.1, 48.1, 56.0, 51.6), "GRPO": (67.8, 53.8, 66.0, 53.9),
                              "SDPO": (62.2, 52.3, 58.8, 51.9), "OPCoD": (70.5, 55.3, 66.1, 54.3)}}
PROBLEMS = {"physics": 690, "chemistry": 1860, "material": 810}         # to train on: data/sciknoweval.py
TESTED = {"physics": 80, "chemistry": 210, "material": 94}


def opcod(first, second, rounds):
    """Return OPCoD's comparison on two of SciKnowEval's domains, with its appendix D's hyperparameters."""
    domains = (first, second)
    files = {part: [f"{domain}={{dir}}/data/{domain}_{part}.jsonl" for domain in domains]
             for part in ("train", "val", "test")}
    specialists = ["{dir}/specialist-1/final", "{dir}/specialist-2/final"]
    solo = dict(prompts=files["train"], mixture=":".join(str(PROBLEMS[domain]) for domain in domains),
                steps=100, batch=32, rollouts=8, lora_rank=64, lr=1e-4, warmup=5, weight_decay=0.01,
                grad_clip=1, adam_beta2=0.999, importance_cap=2, save_every=25)
    grpo = solo | dict(method="grpo", max_new_tokens=8192)
    sdpo = solo | dict(loss="jsd", jsd_beta=0.5, support="student_tail", top_k=100, self_teacher="ema",
                       ema_rate=0.05)
    rows = {}
    for i, domain in enumerate(domains, 1):
        steps = round(3 * PROBLEMS[domain] / 16)                        # three epochs
        rows[f"specialist-{i}"] = dict(
            student="Qwen/Qwen3-8B", method="star", prompts=[files["train"][i - 1]], steps=steps, batch=16,
            lora_rank=8, lr=2e-4, lr_schedule="cosine", warmup=round(steps / 10))
    for i, student in enumerate(specialists, 1):
        rows[f"grpo-{i}"] = dict(student=student) | grpo
    for i, student in enumerate(specialists, 1):
        rows[f"sdpo-{i}"] = dict(student=student) | sdpo | dict(method="sdpo", no_environment=True)
    rows["opcod"] = sdpo | dict(student=specialists, method="opcod", val_prompts=files["val"], rounds=rounds,
                                tau=0.2, gate_rollouts=16, feedback_tokens=1024)
    short = dict(eval_rollouts=1, max_new_tokens=1024)
    return Recipe(
        about=f"OPCoD, 2606.14368, on SciKnowEval L3: {first} and {second}. Two Qwen3-8B specialists, "
              f"student 1 in {first} and student 2 in {second}, are trained on both domains, each alone "
              "(GRPO, SDPO) or as each other's tutors (OPCoD). The test problems and hyperparameters are the "
              "paper's, with these deviations. The paper's full fine-tuning at 1e-5 does not fit one card: "
              "we use LoRA (rank 64, lr 1e-4) instead, at ten times the rate as LoRA needs it, and the "
              "teacher averages adapters. The specialists learn from their own explanations of the gold "
              "answers, since the paper's, by gpt-5-mini, are unpublished; so compare the differences from "
              "the initial row. Losses are means over rollouts of their token means, as in the paper's "
              "equations; its code averages over all tokens. Batches hold the domains in fixed shares, those "
              "of the union. Tutors write at temperature 1. Accuracy in %, mean of 16 completions per "
              "problem.",
        prepare=["data.convert", *(f"hicai-zju/SciKnowEval/{domain}" for domain in domains),
                 "--out", "{dir}/data"],
        common=dict(seed="{seed}", eval_prompts=files["test"], eval_rollouts=16, eval_temperature=0.6,
                    eval_top_p=0.95, max_new_tokens=4096, chat_template_kwargs='{{"enable_thinking": false}}',
                    gradient_checkpointing=True, micro_tokens=16384, sample_batch=32),
        rows=rows,
        table={"initial": ("specialist-1", "specialist-2"), "GRPO": ("grpo-1", "grpo-2"),
               "SDPO": ("sdpo-1", "sdpo-2"), "OPCoD": ("opcod",)},
        columns={domain: domain for domain in domains},
        axes={f"{domain} accuracy, %": (domain,) for domain in domains},
        references=(),
        quick={"": dict(steps=10, batch=8, rollouts=4) | short,
               "specialist-1": dict(steps=20, warmup=2) | short,
               "specialist-2": dict(steps=20, warmup=2) | short,
               "opcod": dict(steps=10, batch=8, rollouts=4, gate_rollouts=2) | short},
        expected={"full": {row: [(score, None) for score in scores]
                           for row, scores in PAPER[first, second].items()}},
        expected_label="paper",
        lengths=(512, 512), evaluated=sum(TESTED[domain] for domain in domains),
        gib={"specialist-1": 38.8, "specialist-2": 38.8, "grpo-1": 59.0, "grpo-2": 59.0, "sdpo-1": 41.7,
             "sdpo-2": 41.7, "opcod": 59.5})


RECIPES = {
    "opcod-phys-chem": opcod("physics", "chemistry", rounds=2),
    "opcod-chem-mat": opcod("chemistry", "material", rounds=2),
    "opcod-mat-phys": opcod("material", "physics", rounds=5),
    "camopd-medical": CAMOPD_MEDICAL,
    "camopd-roleplay": CAMOPD_ROLEPLAY,
    "veto-gsm8k": VETO_GSM8K,
    "opsd-1.7b": OPSD,
    "many-faces": MANY_FACES,
}
