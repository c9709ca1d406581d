"""What chapter 15 asks, and why the answers are what they are."""

from flashlib.cost import device
from flashlib.course.questions.question import Question

_H200 = device("h200")
_PEAK, _EXPONENTIALS = _H200.peak("bf16") / 1e12, _H200.exponentials_per_s / 1e12

QUESTIONS = (
    Question(
        "15-exponentials",
        "One causal layer of Llama 3 8B (head_dim 128). For every 1,000 FLOPs in products: how many exponentials?",
        default=300,
        within=1.5,
        reason="A pair costs 2 (128 + 128) = 512 FLOPs in products, and one exponential.",
    ),
    Question(
        "15-waste",
        "A causal mask over 1,024 tokens, tiles of 128 x 128. How many more pairs than are visible does a kernel compute?",
        default=50,
        unit="%",
        within=1.3,
        reason="36 of 64 tiles are visited, 8 of them half empty. With 16 times the length the share is a sixteenth.",
    ),
    Question(
        "15-devices",
        "8 devices share one layer without a mask. The correction counts the whole square for each device, times 3. By which factor is that too much for a device?",
        default=3,
        within=1.1,
        reason="8 for the devices, and 3 for the softmax.",
    ),
    Question(
        "15-added",
        f"head_dim 64, no mask, 16k tokens, on an H200. Data sheet: {_PEAK:.0f} TFLOP/s in products, {_EXPONENTIALS:.1f} trillion exponentials a second. If the two are added up: how many TFLOP/s?",
        default=round(_PEAK),
        within=1.15,
        reason="At head_dim 64 a pair has 256 FLOPs to each exponential, and the two take equally long: half of the peak is left.",
    ),
    Question(
        "15-fits",
        "Llama 3 8B in bf16 on one H200 (141 GB), all requests at 32,768 tokens. How many fit at once?",
        default=100,
        within=1.3,
        reason="A token takes {kib:.0f} KiB of cache, a request {gib:.0f} GiB.",
    ),
)
