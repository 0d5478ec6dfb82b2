"""One contract for all codecs: what comes back, how long it is, that it repeats, and that nothing damaged or made up is used."""

from __future__ import annotations

import hashlib
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as hadamard_matrix
from scipy.stats import norm

from lichen.common.codec import levels, rotation
from lichen.common.codec.codec import OVERHEAD, Codec, Payload, placed, sums
from lichen.common.codec.feedback import corrected, lost
from lichen.common.codec.layout import Layout
from lichen.common.codec.packing import Lookup, pack, unpack
from lichen.common.codec.plain import Tensors
from lichen.common.codec.registry import CODECS
from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import State

GROUP = rotation.BLOCK * rotation.GROUP
# codec, options, bits of a value, ‖decoded − x‖² / ‖x‖² at most where values are normally distributed
CASES: list[tuple[str, dict[str, Any], float, float]] = [
    *(("eden", {"bits": bits}, bits, most) for bits, most in enumerate([0.58, 0.136, 0.0365, 0.0098, 0.00257, 6.6e-4, 1.68e-4, 4.3e-5], 1)),
    ("blockwise", {"bits": 8}, 8, 5.1e-5),
    ("blockwise", {"bits": 4}, 4, 0.0167),
    ("topk", {"share": 0.1}, 6.4, 0.57),
    ("topk", {"share": 1.0}, 64, 0.0),
    ("fp16", {}, 16, 1e-7),
]
every_codec = pytest.mark.parametrize(("name", "options"), [case[:2] for case in CASES], ids=str)


def update_of(*sizes: int | tuple[int, ...], seed: int = 0, heavy: bool = False) -> State:
    generator = torch.Generator().manual_seed(seed)
    found = {f"layer.{number}": torch.randn(size, generator=generator) for number, size in enumerate(sizes)}
    return {name: tensor**3 for name, tensor in found.items()} if heavy else found


def lora(seed: int = 0) -> State:
    """As the demo's: 24 factors of rank 4 to width 384 with a linear head of 8 labels, and its bias."""
    return update_of(*[(4, 384), (384, 4)] * 24, (8, 384), 8, seed=seed)


def flat_of(update: State) -> torch.Tensor:
    return torch.cat([update[name].reshape(-1) for name in sorted(update)]) if update else torch.zeros(0)


def decoded(codec: Codec, update: State, seed: int = 0) -> State:
    layout = Layout.of(update)
    return codec.open(codec.encoded(update, seed=seed), layout).decoded(layout)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())


# --- what comes back -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "bits", "most"), CASES, ids=str)
def test_the_error_is_the_codecs_own_and_a_value_takes_its_bits(name: str, options: dict[str, Any], bits: float, most: float) -> None:
    codec, update = CODECS[name](**options), lora()
    exact = flat_of(update)
    found = error(flat_of(decoded(codec, update)), exact)
    assert 0.9 * most - 1e-7 <= found <= most
    assert codec.length(len(exact)) * 8 / len(exact) <= 1.02 * bits + 0.15


@pytest.mark.parametrize("count", [9224, 76_808, 1_000_003])
def test_eden_at_4_bits_needs_at_most_4_1_a_value_with_all_headers(count: int) -> None:
    assert len(CODECS["eden"](bits=4).encoded(update_of(count))) * 8 / count <= 4.1  # R8's plan has 9,224 parameters


@every_codec
@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (1,),
        (255,),
        (257,),
        (4095,),
        (4096,),
        (4097,),
        (4096 + 64,),
        (8191,),
        (0, (3, 5), (), 0, 4080, (2, 1, 7)),
        (GROUP - 9, 4111),
        (65_537,),
    ],
)
def test_every_size_comes_back_by_name_and_shape(name: str, options: dict[str, Any], sizes: tuple[Any, ...]) -> None:
    codec, update = CODECS[name](**options), update_of(*sizes)
    data = codec.encoded(update, seed=3)
    exact = flat_of(update)
    assert len(data) == codec.length(len(exact))
    found = decoded(codec, update, seed=3)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in found.items()} == {key: (t.shape, t.dtype) for key, t in update.items()}
    assert len(exact) == 0 or error(flat_of(found), exact) < 0.9


@pytest.mark.parametrize(
    ("name", "options"),
    [("eden", {"bits": 0}), ("eden", {"bits": 9}), ("blockwise", {"bits": 1}), ("topk", {"share": 0}), ("topk", {"share": 1.1})],
)
def test_a_parameter_out_of_range_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(LichenError) as caught:
        CODECS[name](**options)
    assert caught.value.code is Code.PLAN_INVALID


@every_codec
def test_zeros_stay_zeros_and_tiny_values_do_no_harm(name: str, options: dict[str, Any]) -> None:
    for value in (0.0, 1e-38, 1e-45):
        found = decoded(CODECS[name](**options), {"a": torch.full((5000,), value)})
        assert (found["a"].abs() <= 2e-38).all()


@every_codec
def test_the_types_of_the_update_come_back(name: str, options: dict[str, Any]) -> None:
    update = {"a": torch.randn(300, 20).to(torch.bfloat16), "b": torch.randn(40, 30).T, "c": torch.randn(9).to(torch.float64)}
    found = decoded(CODECS[name](**options), update)
    assert [found[key].dtype for key in "abc"] == [torch.bfloat16, torch.float32, torch.float64]
    assert found["b"].shape == (30, 40)
    assert error(found["b"], update["b"]) < 0.9


@pytest.mark.parametrize("bits", [8, 4])
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=600))
@settings(max_examples=30, deadline=None)
def test_nearest_integers_are_off_by_half_a_step_at_most(bits: int, values: list[float]) -> None:
    exact = torch.tensor(values)
    found = decoded(CODECS["blockwise"](bits=bits), {"a": exact})["a"]
    for block, got in zip(exact.split(256), found.split(256), strict=True):
        step = float(block.abs().max()) / (2 ** (bits - 1) - 1)
        assert float((block - got).abs().max()) <= 0.5 * step * (1 + 1e-5) + 1e-30


@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=300), share=st.sampled_from([0.01, 0.1, 0.5, 0.99]))
@settings(max_examples=50, deadline=None)
def test_top_k_keeps_the_largest_and_the_first_of_equals(values: list[int], share: float) -> None:
    kept = math.ceil(round(len(values) * share, 6))
    best = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))[:kept]
    expected = [value if place in best else 0 for place, value in enumerate(values)]
    found = decoded(CODECS["topk"](share=share), {"a": torch.tensor(values, dtype=torch.float32)})["a"]
    assert found.tolist() == expected


def test_eden_spreads_each_tensor_over_the_blocks() -> None:
    update = {"a": torch.zeros(300_000), "b": torch.randn(5000), "c": torch.zeros(300_000)}
    codec = CODECS["eden"](bits=1)
    data, scales = codec.encoded(update), []
    for start in range(0, 148, 32):
        width = min(32, 148 - start)
        scales += np.frombuffer(data, "<f4", width, 40 + start * (4 + 512)).tolist()
    assert len(scales) == 148
    assert sum(scale > 0 for scale in scales) >= 5000 / 64


def test_eden_restores_a_single_value_whatever_its_size() -> None:
    for value in (1.0, -3e-20, 9e29):
        update = {"a": torch.zeros(9000)}
        update["a"][77] = value
        found = decoded(CODECS["eden"](bits=1), update)["a"]
        assert float(found[77]) == pytest.approx(value, rel=1e-5)
        assert float(found.abs().sum()) == pytest.approx(abs(value), rel=1e-5)


# --- bias ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("heavy", [False, True])
def test_edens_errors_average_out_over_seeds(bits: int, heavy: bool) -> None:
    codec, update = CODECS["eden"](bits=bits), update_of(3000, (16, 600), 5, seed=7, heavy=heavy)
    exact, seeds = flat_of(update), 64
    found = [flat_of(decoded(codec, update, seed)) for seed in range(seeds)]
    alone = sum(error(one, exact) for one in found) / seeds
    assert error(torch.stack(found).mean(0), exact) == pytest.approx(alone / seeds, rel=0.1)
    for one in found:  # and none is shorter along the update itself
        assert float(one @ exact) == pytest.approx(float(exact @ exact), rel=1e-4)


def test_at_4_bits_a_value_that_outweighs_its_block_does_not_hide_the_others() -> None:
    codec, exact = CODECS["eden"](bits=4), torch.randn(rotation.BLOCK, generator=torch.Generator().manual_seed(3))
    exact[5] = float(exact.norm())
    others = torch.arange(rotation.BLOCK) != 5
    mean = sum(decoded(codec, {"a": exact}, seed)["a"] for seed in range(50)) / 50
    assert float(mean[others] @ exact[others]) == pytest.approx(float(exact[others].square().sum()), rel=0.01)


def test_at_1_bit_the_error_is_half_pi_less_1() -> None:
    update = update_of(1_000_000)
    assert error(flat_of(decoded(CODECS["eden"](bits=1), update)), flat_of(update)) == pytest.approx(math.pi / 2 - 1, rel=0.01)


def test_what_a_biased_codec_lost_comes_with_later_updates() -> None:
    codec, layout = CODECS["topk"](share=0.05), Layout.of(lora())
    residual: State | None = None
    exact, found, without = (torch.zeros(layout.count) for _ in range(3))
    for round in range(30):
        update = lora(1)
        update["layer.3"] = lora(round + 2)["layer.3"]
        exact += flat_of(update)
        whole = corrected(update, residual)
        sent = codec.open(codec.encoded(whole), layout)
        residual = lost(whole, sent)
        found += flat_of(sent.decoded(layout))
        without += flat_of(decoded(codec, update))
    assert residual is not None
    assert torch.allclose(found + flat_of(residual), exact, atol=1e-4)
    assert error(found, exact) < 0.3 * error(without, exact)


def test_a_residual_of_another_model_is_refused() -> None:
    with pytest.raises(LichenError) as caught:
        corrected(update_of(101), update_of(100))
    assert caught.value.code is Code.STATE_MISMATCH


# --- the parts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128, 1024, 4096])
def test_the_rotation_of_a_smaller_block_is_that_of_whole_ones_by_size(size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    rotated = rotation.hadamard_of(values)
    assert np.allclose(rotation.hadamard_of(rotated) / size, values, atol=1e-5)
    assert np.allclose(rotated, hadamard_matrix(size) @ values, atol=1e-3)


@pytest.mark.parametrize("width", [1, 3, 32])
def test_the_rotation_is_an_isometry_and_its_own_inverse(width: int) -> None:
    generator = np.random.default_rng(width)
    values = generator.standard_normal(rotation.BLOCK * width).astype(np.float32)
    rotated = rotation.hadamard(values.copy(), np.empty_like(values)) / rotation.SIDE
    blocks = [block.astype(np.float64) for block in (values.reshape(-1, width), rotated.reshape(-1, width))]
    assert np.allclose(np.linalg.norm(blocks[0], axis=0), np.linalg.norm(blocks[1], axis=0), rtol=1e-5)
    back = rotation.hadamard(rotated.copy(), np.empty_like(values)) / rotation.SIDE
    assert np.abs(back - values).max() < 1e-5


def test_the_rotation_is_a_hadamard_matrix() -> None:
    for place in (0, 1, 77, 4095):
        values = np.zeros(rotation.BLOCK, np.float32)
        values[place] = 1
        found = rotation.hadamard(values, np.empty_like(values))
        assert (np.abs(found) == 1).all()
        assert (place == 0) == (found == 1).all()


@pytest.mark.parametrize("width", [1, 3, 32])
def test_a_matrix_product_of_levels_is_the_same_rotation_to_the_bit(width: int) -> None:
    """Also of codes that no encoder writes: all the largest, or all but some."""
    outermost = max(float(levels.levels(bits)[-1]) for bits in range(1, 9)) * levels.GRID
    assert outermost.is_integer()
    assert outermost * rotation.BLOCK < 2**24, "every sum is exact in 32-bit floats"
    generator = np.random.default_rng(width)
    drawn = (levels.levels(4) * levels.GRID)[generator.integers(0, 16, rotation.BLOCK * width)]
    largest = np.full(rotation.BLOCK * width, outermost, np.float32)
    for values in (drawn, largest, np.where(drawn > 0, largest, -largest)):
        expected = rotation.hadamard(values.copy(), np.empty_like(values))
        assert np.array_equal(rotation.hadamard_of_integers(values.copy(), np.empty_like(values)), expected)


def test_signs_are_fair_and_another_seeds_are_others() -> None:
    one, other = (rotation.signs(seed, 32) for seed in (1, 2**64 - 1))
    assert (np.abs(one) == 1).all()
    assert abs(one.mean()) < 0.02
    assert abs((one * other).mean()) < 0.02
    assert (rotation.signs(1, 3) == one[: 3 * rotation.BLOCK]).all()


@given(bits=st.integers(1, 8), octets=st.integers(1, 40), data=st.data())
@settings(max_examples=100, deadline=None)
def test_codes_of_every_width_come_back_and_take_no_more_than_their_bits(bits: int, octets: int, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8 * octets, max_size=8 * octets))
    codes = np.array(drawn, np.uint8)
    packed = pack(codes, bits)
    assert len(packed) == octets * bits
    assert int.from_bytes(packed.tobytes(), "little") == sum(code << bits * place for place, code in enumerate(drawn))
    assert (unpack(packed, bits) == codes).all()
    values = np.arange(2**bits, dtype=np.float32) * 3 - 1
    assert (Lookup(values, bits)(packed) == values[codes]).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_levels_are_lloyds_and_max(bits: int) -> None:
    found = levels.levels(bits).astype(np.float64)
    borders = np.concatenate([[-np.inf], (found[1:] + found[:-1]) / 2, [np.inf]])
    means = -np.diff(norm.pdf(borders)) / np.diff(norm.cdf(borders))
    assert np.abs(found - means).max() < 0.6 / levels.GRID, "each level is the mean of what is nearest to it"
    places = np.arange(-6, 6, 1 / 4096)
    cells = levels.cells(bits)[np.floor(places * levels.CELLS_PER_UNIT).astype(int) + levels.MIDDLE]
    nearest = np.abs(places[:, None] - found).min(1)
    assert np.abs(np.abs(places - found[cells]) - nearest).max() <= 1.01 / levels.CELLS_PER_UNIT


# --- adding --------------------------------------------------------------------------------------------------------------------


@every_codec
def test_a_sum_of_parts_is_that_of_decoded_updates(name: str, options: dict[str, Any]) -> None:
    codec, updates = CODECS[name](**options), [update_of(GROUP + 5000, (70, 30), seed=seed) for seed in range(3)]
    layout = Layout.of(updates[0])
    payloads = [codec.open(codec.encoded(update, seed=seed), layout) for seed, update in enumerate(updates)]
    weighted = list(zip(payloads, [100.0, 317.0, 3.0], strict=True))
    assert torch.equal(summed(weighted), expected_of(weighted, layout)), "to the bit"


def test_the_sum_of_updates_that_travel_as_they_are() -> None:
    updates = [update_of(70_000, (0, 4), (33, 7), 5, seed=seed) for seed in range(3)]
    updates[1] = {name: tensor.to(torch.float64) for name, tensor in updates[1].items()}
    layout = Layout.of(updates[0])
    weighted = [(Tensors(update), weight) for update, weight in zip(updates, [100.0, 317.0, 3.0], strict=True)]
    assert torch.equal(summed(weighted), expected_of(weighted, layout)), "to the bit"
    assert all(torch.equal(weighted[0][0].decoded(layout)[name], tensor) for name, tensor in updates[0].items())


def summed(weighted: list[tuple[Payload, float]]) -> torch.Tensor:
    first = weighted[0][0]
    total = torch.full((first.count,), math.nan, dtype=torch.float64)
    for part, values in sums(weighted):
        for view, piece in placed(first, total, part, values):
            view.copy_(piece)
    return total


def expected_of(weighted: list[tuple[Payload, float]], layout: Layout) -> torch.Tensor:
    expected = torch.zeros(layout.count, dtype=torch.float64)
    for payload, weight in weighted:
        expected.add_(flat_of(payload.decoded(layout)), alpha=weight)
    return expected


# --- it repeats ----------------------------------------------------------------------------------------------------------------

PINNED = {
    "eden-1": "3b67015aa048741f",
    "eden-3": "2299e2e53682d19d",
    "eden-4": "ae29c3a84c1bad25",
    "eden-8": "a20aec09b3c0b700",
    "blockwise-8": "db610a1e74631f32",
    "blockwise-4": "f60187ec8f98c03c",
    "topk": "575d469a06afbcbc",
    "fp16": "bb1256a2f8b2fc8c",
}
"""The first digits of the SHA-256 of a payload: what other machines must write too, and later versions must read."""


@pytest.mark.parametrize("case", PINNED)
def test_the_bytes_are_the_same_everywhere(case: str, tmp_path: Path) -> None:
    name, _, bits = case.partition("-")
    codec = CODECS[name](**({"bits": int(bits)} if bits else {}))
    values = torch.tensor([((place * 7919) % 10_007 - 5003) / 4096 * (1 + place % 13) for place in range(150_000)])
    update = {"b": values[:70_000], "a": values[70_000:].view(100, 800)}
    with (tmp_path / "update").open("wb") as file:
        codec.encode(update, file, seed=2**63 + 5)
    data = (tmp_path / "update").read_bytes()
    assert data == codec.encoded({name: update[name] for name in "ab"}, seed=2**63 + 5), "in whatever order"
    assert hashlib.sha256(data).hexdigest()[:16] == PINNED[case]


def test_another_seed_is_another_payload() -> None:
    one, other = (CODECS["eden"](bits=4).encoded(lora(), seed=seed)[OVERHEAD:-16] for seed in (0, 1))
    assert one != other


# --- what is refused -----------------------------------------------------------------------------------------------------------


def refused(codec: Codec, data: bytes, layout: Layout) -> Code:
    with pytest.raises(LichenError) as caught:
        codec.open(data, layout)
    assert len(str(caught.value)) < 300
    return caught.value.code


def forged(data: bytes, at: int, new: bytes) -> bytes:
    """A payload with other bytes and the digest that fits them: what a hostile peer can send."""
    body = data[:at] + new + data[at + len(new) : -16]
    return body + hashlib.sha256(body).digest()[:16]


@every_codec
def test_values_that_are_not_finite_are_not_encoded(name: str, options: dict[str, Any]) -> None:
    for value in (math.nan, math.inf, -math.inf, 3e38):
        update = update_of(9000)
        update["layer.0"][8000] = value
        with pytest.raises(LichenError) as caught:
            CODECS[name](**options).encoded(update)
        assert caught.value.code is Code.STATE_MISMATCH


@every_codec
def test_a_damaged_payload_is_refused_and_not_decoded(name: str, options: dict[str, Any]) -> None:
    codec, update = CODECS[name](**options), update_of(5000)
    data, layout = codec.encoded(update, seed=1), Layout.of(update)
    for length in (0, 3, 39, 71, 72, len(data) // 2, len(data) - 1):
        assert refused(codec, data[:length], layout) is Code.PAYLOAD_CORRUPT
    assert refused(codec, data + b"\0", layout) is Code.PAYLOAD_CORRUPT
    for place in range(0, len(data), max(1, len(data) // 200)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        assert refused(codec, bytes(flipped), layout) in {
            Code.PAYLOAD_CORRUPT,
            Code.PROTOCOL_VERSION,
            Code.CODEC_MISMATCH,
            Code.STATE_MISMATCH,
        }


@every_codec
def test_what_is_not_this_plans_is_refused_by_number(name: str, options: dict[str, Any]) -> None:
    codec, update = CODECS[name](**options), update_of(5000)
    data, layout = codec.encoded(update, seed=1), Layout.of(update)
    assert refused(codec, forged(data, 0, b"lice"), layout) is Code.PAYLOAD_CORRUPT
    assert refused(codec, forged(data, 4, b"\x02"), layout) is Code.PROTOCOL_VERSION
    assert refused(codec, forged(data, 5, b"\x63"), layout) is Code.CODEC_MISMATCH
    assert refused(codec, forged(data, 6, b"\x63\x63"), layout) is Code.CODEC_MISMATCH
    assert refused(codec, forged(data, 16, b"\xff" * 8), layout) is Code.STATE_MISMATCH
    for other in (update_of((50, 100)), {"other": update["layer.0"]}, {"layer.0": update["layer.0"].double()}, update_of(5000, 0)):
        assert refused(codec, data, Layout.of(other)) is Code.STATE_MISMATCH
    assert refused(CODECS["eden" if name != "eden" else "fp16"](), data, layout) is Code.CODEC_MISMATCH


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, 3e30])
@pytest.mark.parametrize("name", ["eden", "blockwise"])
def test_a_scale_that_no_encoder_writes_is_refused(name: str, scale: float) -> None:
    codec, update = CODECS[name](bits=4), update_of(GROUP + 5000)
    data, layout = codec.encoded(update), Layout.of(update)
    for part in (0, 1):  # a payload's parts begin with their scales
        at = 40 + part * (GROUP if name == "eden" else 65_536) // 2 + part * 4 * (32 if name == "eden" else 256)
        assert refused(codec, forged(data, at, struct.pack("<f", scale)), layout) is Code.PAYLOAD_CORRUPT


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_forged_values_and_places_are_refused(value: float) -> None:
    update = update_of(70_000)
    layout = Layout.of(update)
    for name, format in (("topk", "<f"), ("fp16", "<e")):
        codec = CODECS[name]()
        data = codec.encoded(update)
        assert refused(codec, forged(data, len(data) - 16 - 4, struct.pack(format, value)), layout) is Code.PAYLOAD_CORRUPT
    codec = CODECS["topk"](share=0.5)
    data = codec.encoded(update)
    assert refused(codec, forged(data, len(data) - 16 - 4, struct.pack("<f", value)), layout) is Code.PAYLOAD_CORRUPT
    last = 40 + 4 * 35_000 - 4
    for at, place in ((last, 70_000), (last, 2**32 - 1), (last, 0), (40, 69_999), (44, int.from_bytes(data[40:44], "little"))):
        assert refused(codec, forged(data, at, struct.pack("<I", place)), layout) is Code.PAYLOAD_CORRUPT


@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    for name in CODECS:
        codec = CODECS[name]()
        for mixed in (data, codec.encoded(update_of(10))[:40] + data):
            refused(codec, mixed, Layout.of(update_of(10)))


def test_nothing_is_allocated_by_a_number_of_the_peers() -> None:
    update = update_of(5000)
    for name in CODECS:
        codec = CODECS[name]()
        data = codec.encoded(update)
        huge = forged(data, 16, (2**63).to_bytes(8, "little"))
        tracemalloc.start()
        refused(codec, huge, Layout.of(update))
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
        tracemalloc.stop()


@given(seed=st.integers(0, 2**64 - 1), body=st.binary(min_size=64, max_size=64))
@settings(max_examples=30, deadline=None)
def test_whatever_codes_a_peer_makes_up_what_is_added_is_finite(seed: int, body: bytes) -> None:
    update = update_of(5000)
    layout = Layout.of(update)
    for name, start in (("eden", 40 + 8), ("blockwise", 40 + 4 * 20)):
        codec = CODECS[name](bits=4)
        data = codec.encoded(update, seed=seed)
        data = forged(data, 40, struct.pack("<f", 2e30))
        found = codec.open(forged(data, start, body * 30), layout).decoded(layout)
        assert torch.isfinite(found["layer.0"]).all()
