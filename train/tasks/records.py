"""The named tasks: one record each, with what a group of them has in common in a helper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from train.data import Split
from train.data.listops import TEMPLATES
from train.tasks import readers
from train.tasks.record import Part, Question, Record, Row

_Splits = dict[Split, Part]

_OWN: _Splits = {split: Part(split) for split in ("train", "validation", "test")}
_FROM_VALIDATION: _Splits = {
    "train": Part("train"),
    "validation": Part("validation", (("keep", 0.5),)),
    "test": Part("validation", (("hold", 0.5),)),
}
_FROM_TEST: _Splits = {
    "train": Part("train"),
    "validation": Part("test", (("hold", 0.2),)),
    "test": Part("test", (("keep", 0.2),)),
}


def _divided(split: str) -> _Splits:
    """80 % train, 10 % validation and 10 % test of the only split that can be used."""
    return {
        "train": Part(split, (("keep", 0.2),)),
        "validation": Part(split, (("hold", 0.2), ("keep", 0.5))),
        "test": Part(split, (("hold", 0.2), ("hold", 0.5))),
    }


def _task(
    title: str, source: str, columns: str, read: Callable[[Row], Question], defaults: dict[str, Any], **settings: Any
) -> Record:
    """A record of the defaults, the settings in place of some, and what differs always.

    Args:
        title, source, read: as in `Record`.
        columns: names separated by spaces.
        defaults, settings: the other fields of `Record`.
    """
    return Record(title=title, source=source, columns=tuple(columns.split()), read=read, **(defaults | settings))


def _choice_task(title: str, source: str, columns: str, read: Callable[[Row], Question], **settings: Any) -> Record:
    """A question with listed candidates; the completion is "Answer: (B) text."."""
    defaults: dict[str, Any] = {
        "splits": _OWN,
        "prompt": "Choose the right answer to the question.\nQuestion: {question}\n{options}\n",
        "completion": "Answer: ({label}) {sentence}",
        "rule": "label",
        "max_new_tokens": 32,
        "paraphrases": (
            "{question}\n\n{options}\n\nWhich of these is correct?\n",
            "Here is a question with several possible answers. Pick the one that fits.\n{question}\n{options}\n",
        ),
    }
    return _task(title, source, columns, read, defaults, **settings)


def _word_problem(title: str, source: str, columns: str, read: Callable[[Row], Question], **settings: Any) -> Record:
    """A word problem whose answer is a number; the completion is the reasoning, then "Answer: 7"."""
    defaults: dict[str, Any] = {
        "splits": _FROM_TEST,
        "prompt": "{question}\n",
        "completion": "{reasoning}Answer: {number}",
        "rule": "number",
        "max_new_tokens": 40,
        "paraphrases": (
            "Solve this problem step by step.\n{question}\n",
            "Problem: {question}\nWork it out, then give the number.\n",
        ),
    }
    return _task(title, source, columns, read, defaults, **settings)


def _label_task(title: str, source: str, columns: str, read: Callable[[Row], Question], **settings: Any) -> Record:
    """A question whose candidates are labels, such as True and False; the completion is "Answer: True."."""
    defaults: dict[str, Any] = {"completion": "Answer: {label}.", "max_new_tokens": 10}
    return _task(title, source, columns, read, defaults, **settings)


TASKS: dict[str, Record] = {
    "boolq": _label_task(
        "BoolQ",
        "google/boolq",
        "passage question answer",
        readers.boolq,
        splits=_FROM_VALIDATION
        | {"validation": Part("validation", (("keep", 0.2),)), "test": Part("validation", (("hold", 0.2),))},
        prompt="Is the answer to the question true or false, going by the passage?\n"
        "Passage: {passage}\nQuestion: {question}\n",
        rule="truth",
        paraphrases=(
            "{passage}\n\nGiven this text, say True or False: {question}\n",
            "Read the text and answer with True or False.\nText: {passage}\nAsked: {question}\n",
        ),
    ),
    "winogrande": _label_task(
        "Winogrande (debiased)",
        "allenai/winogrande",
        "sentence option1 option2 answer",
        readers.winogrande,
        subset="winogrande_debiased",
        splits=_FROM_VALIDATION,
        prompt="Which option fills the blank in the sentence?\nSentence: {sentence}\n{options}\n",
        option="{label}: {text}",
        rule="label",
        max_new_tokens=8,
        paraphrases=(
            "{sentence}\nFill in the blank with one of these:\n{options}\n",
            "Choose what belongs in the place of the underscore.\n{sentence}\n{options}\n",
        ),
    ),
    "listops": Record(
        title="ListOps (Long Range Arena)",
        source="fengyang0317/listops-1000",
        splits=_OWN,
        columns=("Source", "Target"),
        read=readers.listops,
        prompt=TEMPLATES["tagged"][0],
        completion=TEMPLATES["tagged"][1],
        rule="tagged",
        max_new_tokens=10,
        paraphrases=(
            "{expression}\nWhat digit is this? Write <answer>digit</answer>.\n",
            "Evaluate the nested lists below and put the digit between <answer> and </answer>.\n{expression}\n",
        ),
    ),
    "gsm8k": _word_problem(
        "GSM8K", "openai/gsm8k", "question answer", readers.reasoned, subset="main", max_new_tokens=100
    ),
    "arc_challenge": _choice_task(
        "ARC-Challenge",
        "allenai/ai2_arc",
        "question choices answerKey",
        readers.labelled("question"),
        subset="ARC-Challenge",
    ),
    "arc_easy": _choice_task(
        "ARC-Easy",
        "allenai/ai2_arc",
        "question choices answerKey",
        readers.labelled("question"),
        subset="ARC-Easy",
    ),
    "openbookqa": _choice_task(
        "OpenBookQA",
        "allenai/openbookqa",
        "question_stem choices answerKey",
        readers.labelled("question_stem"),
        subset="main",
    ),
    "aqua": _choice_task(
        "AQuA",
        "deepmind/aqua_rat",
        "question options rationale correct",
        readers.aqua,
        subset="raw",
        prompt="Work out the problem and choose the right answer.\nProblem: {question}\n{options}\n",
        completion="{rationale}\nAnswer: {label}.",
        choice="Answer: {label}.",
        rule="last_label",
        max_new_tokens=256,
        paraphrases=(
            "{question}\n\n{options}\n\nThink it through, then name the letter.\n",
            "A question of mathematics with its possible answers follows. Explain and choose.\n{question}\n{options}\n",
        ),
    ),
    "mnli": _label_task(
        "MNLI (matched)",
        "nyu-mll/glue",
        "premise hypothesis label",
        readers.mnli,
        subset="mnli_matched",
        splits=_divided("validation"),
        prompt="Does the premise entail the hypothesis, contradict it, or neither (neutral)?\n"
        "Premise: {premise}\nHypothesis: {hypothesis}\n",
        rule="relation",
        paraphrases=(
            "{premise}\nIf that is so, is the following ENTAILMENT, NEUTRAL or CONTRADICTION?\n{hypothesis}\n",
            "Say ENTAILMENT, NEUTRAL or CONTRADICTION for these two.\nFirst: {premise}\nSecond: {hypothesis}\n",
        ),
    ),
    "svamp": _word_problem(
        "SVAMP",
        "ChilleD/SVAMP",
        "Body Question Equation Answer",
        readers.svamp,
        prompt="{body}\n{question}\n",
        paraphrases=(
            "Give the equation and its result.\n{body} {question}\n",
            "Situation: {body}\nAsked: {question}\n",
        ),
    ),
    "mawps": _word_problem(
        "MAWPS",
        "garrethlee/MAWPS",
        "question answer",
        readers.reasoned,
        splits={
            "train": Part("train", (("keep", 0.1),)),
            "validation": Part("train", (("hold", 0.1),)),
            "test": Part("test"),
        },
        prompt="Question: {question}\n",
        max_new_tokens=20,
    ),
    "asdiv": _word_problem(
        "ASDiv", "MU-NLPC/Calc-asdiv_a", "question chain result_float", readers.asdiv, splits=_divided("test")
    ),
    "hellaswag": _choice_task(
        "HellaSwag",
        "Rowan/hellaswag",
        "activity_label ctx endings label",
        readers.hellaswag,
        splits=_FROM_VALIDATION,
        prompt="How does the text go on?\n{activity}: {context}\n{options}\n",
        max_new_tokens=64,
        paraphrases=(
            "{activity}: {context}\n\nChoose the best continuation.\n{options}\n",
            "A description breaks off ({activity}). Which ending belongs to it?\n{context}\n{options}\n",
        ),
    ),
    "piqa": _choice_task(
        "PIQA",
        "ybisk/piqa",
        "goal sol1 sol2 label",
        readers.piqa,
        revision="refs/convert/parquet",
        splits=_FROM_VALIDATION,
        prompt="Which way reaches the goal?\nGoal: {goal}\n{options}\n",
        max_new_tokens=64,
        paraphrases=(
            "{goal}\nOne of these works:\n{options}\n",
            "Somebody wants to do this: {goal}\nChoose the sensible solution.\n{options}\n",
        ),
    ),
    "siqa": _choice_task(
        "SIQA",
        "allenai/social_i_qa",
        "context question answerA answerB answerC label",
        readers.siqa,
        revision="refs/convert/parquet",
        splits=_FROM_VALIDATION,
        prompt="Choose the right answer to the question about the situation.\n"
        "Situation: {context}\nQuestion: {question}\n{options}\n",
        paraphrases=(
            "{context} {question}\n\n{options}\n",
            "Think about what people do and feel.\n{context}\n{question}\n{options}\n",
        ),
    ),
    "alpaca": Record(
        title="Instructions (Alpaca)",
        source="yahma/alpaca-cleaned",
        splits=_divided("train"),
        columns=("instruction", "output"),
        read=readers.alpaca,
        prompt="### Instruction:\n{instruction}\n\n{given}### Response:\n",
        completion="{output}",
        rule="exact",
        max_new_tokens=256,
        paraphrases=(
            "Instruction: {instruction}\n{given}Response:\n",
            "{instruction}\n\n{given}",
        ),
    ),
    "chat": Record(
        title="Conversations",
        source="HuggingFaceTB/smoltalk",
        subset="everyday-conversations",
        splits=_FROM_TEST,
        columns=("messages",),
        read=readers.conversation,
        prompt="",
        completion="",
        rule="exact",
        max_new_tokens=256,
    ),
}
"""The definition of every named task, by its name."""
