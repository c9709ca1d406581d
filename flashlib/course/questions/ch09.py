"""What chapter 09 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "09-kept-matrices",
        "How many N × N matrices does autograd keep for each head, after naive attention?",
        default=1,
        within=1.25,
        reason="The weights for softmax's gradient, again for the product with V, and small masks.",
    ),
    Question(
        "09-row-sums",
        "Each row of dS is summed over its keys. What comes out?",
        default="it depends on the row",
        choices=("0", "1", "the row's delta", "it depends on the row"),
        reason="Softmax does not change when all scores of a row rise together.",
    ),
    Question(
        "09-products",
        "Autograd's backward does 4 products of N × N × D. How many, if P is recomputed?",
        default=8,
        within=1.0,
        reason="dV, dP, dQ and dK as before, and S once more: a quarter more arithmetic.",
    ),
    Question(
        "09-k-loads",
        "3 query heads, 1 KV head, 96 tokens, causal, tiles of 32 x 32. How often does the backward load K?",
        default=2,
        within=1.15,
        reason="Once by the dK/dV kernel; by the dQ kernel 1/3 + 2/3 + 3/3 for each of 3 heads.",
    ),
    Question(
        "09-finite-differences",
        "A finite difference with h = 1e-6 in float32, for a slope of attention. Its relative error is",
        default="below 1e-5",
        choices=("below 1e-5", "about 1e-3", "above 1e-2"),
        reason="f(x + h) and f(x - h) agree in all but their last bits: rounding is what is left.",
    ),
    Question(
        "09-orders",
        "The same 32 contributions in 100 random orders: how many dQ that differ in some bit?",
        default=1,
        within=1.05,
        reason="65,536 numbers, and one last bit in one of them makes another dQ.",
    ),
    Question(
        "09-losses",
        "After four steps of Adam: to how many digits after the point do the losses agree?",
        default="2",
        choices=("all differ in the first", "2", "4 or more"),
        reason="They compute the same function, and differ by rounding alone.",
    ),
)
