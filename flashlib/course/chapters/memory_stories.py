"""What chapter 14 lets a model remember: a text it cannot know, questions about it, and how likely it thinks the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HARBOR", "ORCHARD", "Question", "Story", "log_probabilities"]


@dataclass(frozen=True)
class Question:
    """The beginning of a sentence, and how the story ends it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Story:
    """A text, and questions that nobody can answer without it."""

    text: str
    questions: tuple[Question, ...]


# Invented, so that no model has read it.
HARBOR = Story(
    "Notes from the harbor of Veldmark. The harbor master is called Ilona Brask. She came to the town in 1987 and lives above "
    "the rope shop. The lighthouse is painted green. Ships from the north pay a toll of nine silver coins, and ships from the "
    "south pay nothing. The old ferry is named Marigold. Every Thursday the harbor is closed, because the bridge is being "
    "repaired. The keeper of the lighthouse keeps three goats and a parrot that speaks Portuguese.\n",
    (
        Question("The harbor master of Veldmark is called", " Ilona Brask"),
        Question("The lighthouse of Veldmark is painted", " green"),
        Question("In Veldmark, ships from the north pay a toll of", " nine silver coins"),
        Question("The old ferry of Veldmark is named", " Marigold"),
        Question("In Veldmark, the harbor is closed every", " Thursday"),
        Question("The parrot of the lighthouse keeper speaks", " Portuguese"),
    ),
)

# Of the same kind and length, and of no help with those questions: what a memory does by being there at all.
ORCHARD = Story(
    "Notes from the orchard of Tannholt. The gardener has four hundred apple trees, and half of them were planted by his "
    "grandmother. In spring he cuts the branches, in summer he waters the young trees, and in autumn people from three "
    "villages come to help him pick. The apples are stored in a cellar under the hill, where it is cool and dark. Some are "
    "pressed into juice, and some are dried in rings on long strings. In winter he repairs the ladders and reads old books "
    "about bees, of which he would like to have a few hives.\n",
    (),
)


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[float]:
    """For each question, the natural logarithm of the probability that the model continues with the answer.

    The sum, over the answer's tokens, of the log-probability of each after all that came before it. The questions go through
    the model as one batch. With a memory, call this inside :func:`flashlib.interop.transformers_memory.with_memory`.
    """
    prompts, answers = (
        [tokenizer(getattr(question, part)).input_ids for question in questions] for part in ("prompt", "answer")
    )
    texts = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    # Padded on the right: no token of a causal model sees what follows it, so what stands there does not matter.
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    logits = model(padded.to(model.device), use_cache=False).logits.float().log_softmax(-1)
    return [
        float(sum(logits[row, len(prompt) - 1 + at, token] for at, token in enumerate(answer)))
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
