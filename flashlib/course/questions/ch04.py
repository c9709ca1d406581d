"""What chapter 04 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "04-prefix-and-causal",
        "A model shall read a question of 5 tokens in both directions and write its answer causally. Somebody writes Prefix(5) & Causal(). Which mask is that?",
        default="the prefix mask",
        choices=("the prefix mask", "the causal mask", "the first 5 keys alone"),
        reason="& means both, and the causal mask forbids all that the prefix would add.",
    ),
    Question(
        "04-keys-seen",
        "The last query alone, against all 512 keys, in SDPA with is_causal=True: it sees how many?",
        default=512,
        within=1.0,
        reason="PyTorch aligns top-left: the only row is row 0, and row 0 sees key 0 alone.",
    ),
    Question(
        "04-hidden-nan",
        "Positions 300 to 511 of K and V hold NaN, and all scores with them are set to -inf before the softmax. How many of the 300 real rows come out as NaN?",
        default=0,
        within=1.0,
        reason="Each hidden weight is 0, but the sum of p v still holds 0 * NaN, which is NaN.",
    ),
    Question(
        "04-blind-row",
        "Hidden scores get -1e9 instead of -inf. A row sees no key at all. What is its output?",
        default="0",
        choices=("0", "NaN", "the mean of the values it must not see"),
        reason="Next to 1e9 each score is lost in rounding, so all 8 keys weigh the same.",
    ),
    Question(
        "04-causal-tiles",
        "Causal, 512 queries and keys, tiles of 128 x 128. What share of the tiles must be computed?",
        default=50,
        unit="%",
        within=1.1,
        reason="With n tiles a side it is (n + 1) / 2n, and n is only 4.",
    ),
    Question(
        "04-window-growth",
        "A causal window of 128. From 1,024 to 2,048 tokens, the K that is read grows by which factor?",
        default=4,
        within=1.2,
        reason="Each block of rows reads the two tiles that its window touches.",
    ),
    Question(
        "04-foreign-weight",
        "Somebody packs the four texts and forgets Documents: plain causal attention. In this layer, what share of the last text's attention falls on the other three texts?",
        default=10,
        unit="%",
        within=1.3,
        reason="Nothing in a key says to which text it belongs, and most keys are of other texts. Here each text was read by itself, so that positions begin again and foreign keys look near; where the model reads the four as one text, it is {as_one:.0%}.",
    ),
    Question(
        "04-outside-window",
        "Layer 18, 512 tokens of Alice: what share of the attention falls outside a window of 64?",
        default=10,
        unit="%",
        within=1.3,
        reason="The nearest 64 tokens are not where most of this layer's heads look.",
    ),
)
