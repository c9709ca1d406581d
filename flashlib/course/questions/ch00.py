"""What chapter 00 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "00-attention-calls",
        "The model will write 8 tokens (words, or pieces of them). How often is attention called?",
        default=8,
        within=1.3,
        reason="Each of the 30 layers attends once for each token that is written.",
    ),
    Question(
        "00-softmax-called",
        "Somebody hands in torch.softmax. Its numbers are right. Which points does that earn?",
        default="those for softmax",
        choices=("all", "those for softmax", "none"),
        reason="What an exercise asks you to write is taken out of PyTorch while your code runs.",
    ),
)
