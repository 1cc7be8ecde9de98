"""IFEval (2311.07911): does a completion follow instructions that a program can check? lm-eval's checkers.

The answer of a prompt row is the list of its instructions as JSON, each with its arguments:

    [["punctuation:no_comma", {}], ["keywords:existence", {"keywords": ["sun", "moon"]}]]

A completion is judged as it is, which is called strict. Prompt-level accuracy is the share of completions
with score 1, the report's pass@1. The mean score is instruction-level accuracy, but with prompts of equal
weight; in lm-eval all instructions have equal weight. Two prompts of the set want a number of # and of !,
for which every copy of the checker draws a letter at random; here it is always the same one.

nltk's punkt_tab, which splits words, is fetched from nltk's server. Where that cannot be reached, the package
llama-index-core has it.
"""
import contextlib
import json
import logging
import random
from functools import cache
from importlib.util import find_spec

from config import Refused, nearest, parse_json


def prompt_row(row):
    """Return the prompt row of a row of IFEval. On the hub it has all arguments, of which most are None."""
    given = [{name: x for name, x in kwargs.items() if x is not None} for kwargs in row["kwargs"]]
    instructions = list(zip(row["instruction_id_list"], given, strict=True))
    return {"prompt": row["prompt"], "grader": "ifeval",
            "answer": json.dumps(instructions, ensure_ascii=False)}


@cache
def classes():
    """Return lm-eval's {instruction: class of its checker}; refuse what it needs and is not there."""
    try:
        import langdetect
        import nltk
        package = find_spec("llama_index")
        for folder in package.submodule_search_locations if package else []:
            nltk.data.path.append(f"{folder}/core/_static/nltk_cache")
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            if not nltk.download("punkt_tab", quiet=True):
                raise Refused("grader 'ifeval' needs nltk's punkt_tab, and nltk cannot fetch it; the package "
                              "llama-index-core has it: pip install --no-deps llama-index-core") from None
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise Refused(f"grader 'ifeval' needs lm-eval: pip install 'lm-eval[ifeval]' ({error})") from None
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)     # it reports every text without a language
    langdetect.DetectorFactory.seed = 0             # otherwise a text's language can change from call to call
    return INSTRUCTION_DICT


def checkers(answer):
    """Return a checker for each instruction of a row's answer; None if that is no list of instructions."""
    try:
        instructions = [(name, dict(kwargs)) for name, kwargs in parse_json(answer)]
    except (ValueError, TypeError):
        return None
    state = random.getstate()
    random.seed(0)                                      # for what lm-eval draws: the same in every process
    try:
        return [checker(*instruction) for instruction in instructions] or None
    finally:
        random.setstate(state)


def checker(name, kwargs):
    """Return an instruction's checker; refuse what lm-eval does not know, and what it would have to draw."""
    if name not in classes():
        raise Refused(f"grader 'ifeval': unknown instruction {name!r}; {nearest(name, classes())}")
    made = classes()[name](name)
    try:
        made.build_description(**{key: x for key, x in kwargs.items() if x})    # lm-eval leaves out 0, too
        drawn = (made.get_instruction_args() or {}).keys() - kwargs.keys()
    except (TypeError, ValueError, AttributeError) as error:
        raise Refused(f"grader 'ifeval': {name} cannot have the arguments {kwargs}: {error}") from None
    if drawn:
        raise Refused(f"grader 'ifeval': {name} has no {', '.join(sorted(drawn))}")
    return made


def share_followed(text, instructions):
    """Return the share of instructions that a text follows; an empty text follows none."""
    followed = 0
    for checker in instructions if text.strip() else []:
        with contextlib.suppress(Exception):            # deep JSON, say, has RecursionError: not followed
            followed += bool(checker.check_following(text))
    return followed / len(instructions)
