"""What report.html says besides numbers: its looks, its method, its captions."""

from __future__ import annotations

from .results import ALL_GATES
from .stacks import ALL_STACKS

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2329; max-width: 66rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { margin-top: 2.6rem; border-bottom: 1px solid #d8dde2; padding-bottom: .2rem; }
h3 { margin-bottom: .3rem; }
p.note, figcaption, footer { color: #5a646e; font-size: .88rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { flex: 1 1 11rem; border: 1px solid #d8dde2; border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.55rem; color: #14785a; }
.card.bad b { color: #b3261e; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0 1.2rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #eceff1; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #c4ccd3; }
td.good { color: #14785a; font-weight: 600; }
td.bad { color: #b3261e; font-weight: 600; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
"""

METHOD = (
    "Ratios are p50 against p50 of one run. The implementations of a case are timed in turns, "
    "round by round, in rotating order, so that a slow moment of a shared machine hits all of "
    "them; absolute times of a shared machine mean little. p20 and p80 are in results.json.",
    "Nothing is timed before its numbers are right: outputs and gradients of the very problem are "
    "judged against float64 by the project's tolerance (at most twice eager's own error forward, "
    "three times in gradients, plus rounding).",
    "Modules and stacks: sdpa is torch.nn's module as its own layers call it "
    "(need_weights=False), eager the same with its default arguments.",
    "eager is written by hand with a mask made beforehand; sdpa is F.scaled_dot_product_attention, "
    "with that mask where lengths are ragged; compile is torch.compile of eager at fixed shapes. "
    "The best peer is the fastest of those that were measured. Forward runs without autograd.",
    "Memory is the peak beyond the inputs, the result included: what torch's allocator was asked "
    "for, from the profiler. For mmfast on Linux also what a fresh process touched (high-water "
    "mark of resident memory, reset just before the call), which sees scratch memory that bypasses "
    "the allocator; the larger counts. For the peers such scratch is not counted, in their "
    "favour.",
    "Percent of peak: the least time that this machine's own measured matrix-product rate and "
    "memory bandwidth allow, over the time taken. Counted are the products of valid pairs, two "
    "forward and five backward, and each tensor moved once.",
    "Gates are bound by memory. Percent of clone(): the bytes of the tensors that must be read or "
    "written once, over the time taken, against the bandwidth that clone() of one such tensor had "
    "in the same rounds (p50 both; above 100 is possible: of what a clone moves half are fresh "
    "pages, of what an op moves less, and mmfast asks for large pages). Means are of cases whose "
    "tensors fill the last-level cache twice; other cases stand in brackets. An untimed call goes "
    "before each sample. Large cases are judged on rows spread over them, and as a whole against "
    "eager.",
)

METHOD_ON_A_DEVICE = (
    "On this device times are those between two events around each call, as the stream sees them: "
    "the L2 cache is flushed before each call, and the device is kept busy until the host has "
    "queued it. What a call costs the host is the case tiny, by the host's clock.",
    "sdpa_flash, sdpa_efficient, sdpa_cudnn and sdpa_math are F.scaled_dot_product_attention with "
    "that backend alone; flex is FlexAttention, compiled, with a block mask of the lengths; "
    "varlen (torch.nn.attention.varlen), flash_attn and xformers take the valid keys packed, which "
    "is done before the clock starts and not undone while it runs, in their favour. A peer that "
    "cannot take a problem is listed below with what it said.",
)

_STACKS_CAPTION = (
    "Each module against the faster of torch.nn's own, on the same weights. pool: one query over "
    "an image; qformer: 32 queries over a wider image, MultiheadAttention (drop-in) or "
    "CrossModalAttention; block: norm, cross-attention and feed-forward over a padded context; "
    "layers: a decoder whose layers share a padded context; steps: generation over it, where "
    "torch.nn has no cache."
)
_GATES_CAPTION = (
    "Bars: geometric means over the shapes. Diamonds: the worst shape against the best peer."
)
CAPTIONS = {ALL_GATES: _GATES_CAPTION, ALL_STACKS: _STACKS_CAPTION}
DROP_IN = (
    "Whole models of Hugging Face transformers at their published base sizes, random weights, "
    "float32, inference, a padded batch: the stock model at each attention implementation that it "
    "has (eager and sdpa; many have eager alone), and a twin on the same weights after "
    "mmfast.patch(model). Timed in turns, p50; memory is the peak of the forward beyond weights "
    "and inputs, its result included, as asked for from torch's allocator. Before anything is "
    "timed the outputs of both are compared on the rows that are no padding; the largest "
    "difference, of the largest value, is in the last column. Modelled: what report.estimate() "
    "says for 60 % valid tokens from the share of parameters that skip padding."
)
