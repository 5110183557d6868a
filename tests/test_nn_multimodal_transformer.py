"""`mmfast.nn.MultimodalTransformer`: the model in plain torch, and what a missing modality is."""

from __future__ import annotations

import copy
from typing import Any

import multimodal_helpers as helpers
import pytest
import torch
from multimodal_helpers import LENS, B, batch, exactly, features, make, plain, same, targets
from nn_helpers import assert_near, compare
from torch import Tensor

from mmfast.nn import MultimodalTransformer, PackedTokens, _encoding
from mmfast.nn._modality_stream import ModalityStream

PATTERNS = ("all_to_all", "to_anchor", "bottleneck")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_first": False, "pooling": "mean", "fusion": "sigmoid"},
    {"pattern": "to_anchor", "pooling": "first"},
    {"pattern": "to_anchor", "anchor": "audio", "norm_first": False},
    {"pattern": "bottleneck", "fusion": "gmu"},
    {"pattern": "bottleneck", "fusion_layer": 1, "norm_first": False},
    {"fusion_layer": 1},
    {"fusion_layer": 2},
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["packed", "padded"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Padded streams are what accelerators and torch.compile see: lengths that cannot be read."""
    if request.param == "padded":
        monkeypatch.setattr(ModalityStream, "packable", lambda self: False)
        monkeypatch.setattr(_encoding, "readable", lambda tensor: False)
    return request.param


def plain_features(model: Any, *xs: Tensor, lens: Any = None) -> Tensor:
    found = plain(model, dict(zip(helpers.WIDTHS, xs, strict=False)), lens)[0]
    return torch.cat([found, *(head(found) for head in model.heads.values())], dim=1)


# --- the same results --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant(variant: dict[str, Any], form: str) -> None:
    """Results and all gradients, with missing modalities and padding."""
    model = make(**variant)
    compare(
        model,
        lambda m, *xs: features(m, *xs, lens=LENS),
        lambda m, *xs: plain_features(m, *xs, lens=LENS),
        *batch().values(),
    )
    if form == "packed":
        compare(model, features, plain_features, *batch().values())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16(pattern: str) -> None:
    model = make(pattern=pattern).to(torch.bfloat16)
    inputs = batch(dtype=torch.bfloat16)
    exact = plain(copy.deepcopy(model).double(), {n: x.double() for n, x in inputs.items()}, LENS)
    got, eager = model(inputs, lens=LENS).features, plain(model, inputs, LENS)[0]
    assert_near("features", got, exact[0], eager)


def test_one_modality_and_a_token_each() -> None:
    model = make(encoders={"image": None}, widths={"image": 6})
    compare(model, features, plain_features, batch()["image"])
    vectors = torch.randn(B, 6)
    same(features(model, vectors), features(model, vectors.unsqueeze(1)))


def test_the_loss_is_the_weighted_sum() -> None:
    model = make(loss_weights={"score": 0.25})
    out = model(batch(), targets=targets())
    expected = {
        "label": torch.nn.functional.cross_entropy(out.logits["label"], targets()["label"]),
        "score": torch.nn.functional.mse_loss(out.logits["score"][:, 0], targets()["score"]),
    }
    same(out.losses, expected)
    same(out.loss, expected["label"] + 0.25 * expected["score"])
    assert model(batch()).loss is None and model(batch()).losses == {}
    assert list(model(batch(), targets={"score": targets()["score"]}).losses) == ["score"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_maps(pattern: str, form: str) -> None:
    model, inputs = exactly(pattern=pattern)
    out = model(inputs, lens=LENS, return_importance=True, return_attention="per_head")
    mean = model(inputs, lens=LENS, return_attention=True)
    assert mean.importance == {} and mean.pooling == {}
    _, weights, maps = plain(model, inputs, LENS)
    same(out.modality_weights, weights)
    names = list(model.modalities)
    streams = {"all_to_all": names, "to_anchor": ["text"], "bottleneck": names}[pattern]
    assert set(out.importance) == set(streams)
    for name in streams:
        sources = [n for n in names if n != name] if pattern != "bottleneck" else [name]
        for b in range(B):
            rows, first = int(LENS[name][b]), 0
            if pattern == "bottleneck":
                first = 4
            for layer, seen in enumerate(maps[b][name]):
                at, start = 0, 0 if pattern == "bottleneck" else None
                parts = sources if start is None else ["bottleneck", *sources]
                for source in parts:
                    columns = 4 if source == "bottleneck" else int(LENS[source][b])
                    expected = seen[:, first:, at : at + columns]
                    got = out.attention[name][source][b, layer]
                    same(got[:, :rows, :columns], expected)
                    assert (got[:, rows:] == 0).all() and (got[:, :, columns:] == 0).all()
                    same(mean.attention[name][source][b, layer], got.mean(0))
                    share = out.importance[name][source][b, layer]
                    same(share[:, :columns], seen.mean(1)[:, at : at + columns])
                    assert (share[:, columns:] == 0).all()
                    at += columns
    for name, shares in out.pooling.items():
        assert shares.shape == inputs[name].shape[:2]
        same(shares.sum(1), (LENS[name] > 0).float())
        assert (shares[torch.arange(shares.shape[1]) >= LENS[name].unsqueeze(1)] == 0).all()


# --- missing modalities ------------------------------------------------------------------------


def run(model: MultimodalTransformer, *args: Any, **options: Any) -> list[Tensor]:
    out = model(*args, **options)
    leaves = [p for n, p in model.named_parameters() if not n.startswith("heads")]
    grads = torch.autograd.grad(out.features.square().sum(), leaves, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
    return [out.features, out.modality_weights, *zeros]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absent", ["image", "text", "audio"])
def test_missing_is_missing(pattern: str, absent: str, form: str) -> None:
    """Left out, None, present False, length 0; whatever it holds. Gradients are the same."""
    model, inputs = exactly(pattern=pattern)
    column = list(model.modalities).index(absent)
    rest = {name: x for name, x in inputs.items() if name != absent}
    nan = {**inputs, absent: torch.full_like(inputs[absent], torch.nan)}
    present = torch.ones(B, 3, dtype=torch.bool)
    present[:, column] = False
    expected = run(model, rest)
    assert (expected[1][:, column] == 0).all()
    for got in (
        run(model, {**rest, absent: None}),
        run(model, nan, present=present),
        run(model, nan, present={absent: present[:, column]}),
        run(model, nan, lens={absent: torch.zeros(B, dtype=torch.int32)}),
    ):
        same(got, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_missing_in_some_items(pattern: str, form: str) -> None:
    model, inputs = exactly(pattern=pattern)
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]]).bool()
    expected = run(model, inputs, present=present)
    lens = {n: present[:, k] * x.shape[1] for k, (n, x) in enumerate(inputs.items())}
    same(run(model, inputs, lens=lens), expected)
    holes = {n: x.clone() for n, x in inputs.items()}
    for k, x in enumerate(holes.values()):
        x[~present[:, k]] = torch.nan
    got = run(model, holes, present=present)
    same(got, expected)
    assert (got[0][3] == 0).all() and (got[1][~present] == 0).all()


@pytest.mark.parametrize("holes", [False, True])
def test_an_encoder_whose_lengths_cannot_be_read(
    holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives them on the accelerator, but `present` is on the CPU: items can be left out."""

    class Encoder(torch.nn.Module):
        def forward(self, tokens: Tensor, lens: Tensor, attention_mask: Tensor) -> Any:
            assert tokens.shape[0] == 3
            return Answer(tokens) if holes else (tokens, lens)

    model, inputs = exactly(encoders={"image": Encoder(), "text": None, "audio": None})
    lens = torch.tensor([5, 0, 2, 1])
    mask = torch.arange(5) < lens.unsqueeze(1)
    image = {"tokens": inputs["image"], "lens": lens, "attention_mask": mask}
    present = {"image": torch.tensor([True, False, True, True])}
    expected = run(model, {**inputs, "image": image}, present=present)
    monkeypatch.setattr(
        ModalityStream, "packable", lambda self: isinstance(self.tokens, PackedTokens)
    )
    same(run(model, {**inputs, "image": image}, present=present), expected)


def test_none_in_a_list() -> None:
    model, inputs = exactly()
    lists = {n: list(x) for n, x in inputs.items() if n != "image"}
    lists["text"][1] = lists["audio"][0] = None
    present = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1]]).bool()
    expected = model(inputs, present=present).features
    same(model({"image": inputs["image"], **lists}).features, expected)


def test_none_in_a_list_for_an_encoder() -> None:
    class Words(torch.nn.Module):
        def forward(self, texts: list[str]) -> list[Tensor]:
            return [torch.full((len(text.split()), 5), float(len(text))) for text in texts]

    model, inputs = exactly(
        encoders={"image": torch.nn.Linear(6, 6), "text": Words(), "audio": None}
    )
    del inputs["audio"]
    texts = ["a stamp", None, "a big red stamp", None]
    got = model({**inputs, "text": texts})
    words = torch.tensor([2, 0, 4, 0])
    assert (got.modality_weights[:, 1] > 0).equal(words > 0)
    model.encoders["text"] = torch.nn.Identity()
    tokens = torch.tensor([7.0, 0.0, 15.0, 0.0]).view(4, 1, 1).expand(4, 4, 5).double()
    same(got.features, model({**inputs, "text": tokens}, lens={"text": words}).features)


def test_frames_of_all_items() -> None:
    """The size of an encoder's input need not be that of the batch."""

    class Frames(torch.nn.Module):
        def forward(self, frames: Tensor) -> PackedTokens:
            return PackedTokens(frames, torch.tensor([0, 2, 2, 7, 9]))

    model, inputs = exactly(encoders={"image": Frames(), "text": None, "audio": None})
    inputs["image"] = torch.randn(9, 6, dtype=torch.float64)
    assert model(inputs).modality_weights[:, 0].gt(0).tolist() == [True, False, True, True]
    some = {"image": torch.tensor([True, True, False, True])}
    out = model(inputs, present=some)
    assert out.modality_weights[:, 0].gt(0).tolist() == [True, False, False, True]
    same(out.features[[0, 1, 3]], model(inputs).features[[0, 1, 3]])


def test_padding_may_be_nan(form: str) -> None:
    model, inputs = exactly(encoders=dict.fromkeys(helpers.WIDTHS))
    expected = run(model, inputs, lens=LENS)
    for name, x in inputs.items():
        x[torch.arange(x.shape[1]) >= LENS[name].unsqueeze(1)] = torch.nan
    same(run(model, inputs, lens=LENS), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_items_are_independent(pattern: str, form: str) -> None:
    model, inputs = exactly(pattern=pattern)
    whole = model(inputs, lens=LENS)
    for b in range(B):
        one = {n: x[b : b + 1] for n, x in inputs.items()}
        out = model(one, lens={n: lens[b : b + 1] for n, lens in LENS.items()})
        same(out.features[0], whole.features[b])
        for name, tokens in out.streams.items():
            same(tokens[0], whole.streams[name][b])
    inputs["image"][0] = torch.nan
    hurt = model(inputs, lens=LENS).features
    assert hurt[0].isnan().all()
    same(hurt[1:], whole.features[1:])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_everything_missing(pattern: str, form: str) -> None:
    """Features are 0, the loss is that of the heads' biases, gradients are finite."""
    model = make(pattern=pattern)
    nan = {n: torch.full_like(x, torch.nan) for n, x in batch().items()}
    nobody = torch.zeros(B, 3, dtype=torch.bool)
    for out in (
        model(nan, present=nobody, targets=targets()),
        model({}, present=nobody, targets=targets()),
    ):
        assert (out.features == 0).all() and (out.modality_weights == 0).all()
        out.loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
        assert model.heads["label"].bias.grad.abs().sum() > 0


def test_the_order_of_modalities_is_irrelevant() -> None:
    model, inputs = exactly()
    expected = model(inputs, lens=LENS)
    names = ["audio", "image", "text"]
    other = make(
        encoders={n: copy.deepcopy(model.encoders[n]) for n in names},
        widths={n: helpers.WIDTHS[n] for n in names},
    )
    state = model.state_dict()
    order = [list(model.modalities).index(n) for n in names]
    parts = state["fusion.gate_proj.weight"][order].chunk(3, dim=1)
    state["fusion.gate_proj.weight"] = torch.cat([parts[k] for k in order], dim=1)
    state["fusion.gate_proj.bias"] = state["fusion.gate_proj.bias"][order]
    for part in ("weight", "bias"):
        kept = [state[f"fusion.projs.{k}.{part}"] for k in order]
        state |= {f"fusion.projs.{k}.{part}": value for k, value in enumerate(kept)}
    other.double().load_state_dict(state)
    got = other(dict(reversed(inputs.items())), lens=LENS)
    same(got.features, expected.features)
    same(got.modality_weights, expected.modality_weights[:, order])


def test_items_without_a_modality_are_not_encoded() -> None:
    """So that they can neither cost anything nor spoil the statistics of a batch norm."""

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(6)
            self.seen: list[int] = []

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            self.seen.append(x.shape[0])
            return self.norm(x.transpose(1, 2)).transpose(1, 2) * scale

    encoder = Encoder()
    model = make(encoders={"image": encoder, "text": None, "audio": None}).train()
    inputs = batch()
    inputs["image"][1] = torch.nan
    there = torch.tensor([True, False, True, True])
    model({**inputs, "image": {"x": inputs["image"], "scale": 2.0}}, present={"image": there})
    model({**inputs, "image": (inputs["image"],)}, present={"image": there})
    model(inputs, present={"image": torch.zeros(B, dtype=torch.bool)})
    assert encoder.seen == [3, 3]
    assert encoder.norm.running_mean.isfinite().all()


# --- what encoders give ------------------------------------------------------------------------


class Answer:
    def __init__(self, tokens: Tensor) -> None:
        self.last_hidden_state = tokens


def test_what_encoders_may_give() -> None:
    model, inputs = exactly(encoders=dict.fromkeys(helpers.WIDTHS))
    x, lens = inputs["image"], torch.tensor([5, 2, 0, 1])
    expected = model(inputs, lens={"image": lens}).features
    items = [row[:n] for row, n in zip(x, lens.tolist(), strict=True)]
    jagged = torch.nested.nested_tensor(items, layout=torch.jagged)
    mask = torch.arange(5) < lens.unsqueeze(1)

    class Masked(torch.nn.Module):
        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Any:
            return Answer(tokens)

    for image in (PackedTokens.from_padded(x, lens), jagged, items, (x, lens)):
        same(model({**inputs, "image": image}).features, expected)
    full = model(inputs).features
    for image in (Answer(x), {"last_hidden_state": x}, (x, x[:, 0])):
        same(model({**inputs, "image": image}).features, full)
    model.encoders["image"] = Masked()
    for shift in (0, 2):  # padding on the right, and on both sides
        image = {"tokens": x.roll(shift, 1), "attention_mask": mask.roll(shift, 1).long()}
        out = model({**inputs, "image": image}, return_importance=True)
        same(out.features, expected)
        assert (out.importance["text"]["image"][1, 0, 0] > 0).equal(mask.roll(shift, 1)[1])
        assert ((out.streams["image"] != 0).any(-1)).equal(mask.roll(shift, 1))


@pytest.mark.parametrize("pooling", ["attention", "mean", "first"])
def test_padding_in_any_place(pooling: str, form: str) -> None:
    model, inputs = exactly(pooling=pooling, encoders=dict.fromkeys(helpers.WIDTHS))
    mask = torch.arange(5) < LENS["image"].unsqueeze(1)
    expected = model(inputs, lens={"image": LENS["image"]}).features

    class Masked(torch.nn.Module):
        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Any:
            return Answer(tokens)

    model.encoders["image"] = Masked()
    tokens = inputs["image"].masked_fill(~mask.unsqueeze(-1), torch.nan)
    tokens = torch.cat([tokens, tokens[:, :2] * torch.nan], dim=1)
    mask = torch.cat([mask, mask[:, :2] & False], dim=1)
    image = {"tokens": tokens.roll(2, 1), "attention_mask": mask.roll(2, 1).long()}
    same(model({**inputs, "image": image}).features, expected)


def test_an_encoder_in_another_dtype() -> None:
    model, inputs = exactly()
    expected = model(inputs).features
    model.encoders["image"].to(torch.float32)
    got = model({**inputs, "image": inputs["image"].float()}).features
    same(got, expected, 1e-4)
