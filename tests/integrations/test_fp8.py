"""KV in eight bits: how far it is from what it was, and that it is never taken for that."""

import pytest

from async_cache import ModelLayout, ObjectGroup
from async_cache.l2.memory import MemoryBackend

from .test_transformers import CHUNK, TOKENS, compute_cold, fill_l2, make_model, make_prefix, open_cache

torch = pytest.importorskip("torch")
fp8 = pytest.importorskip("async_cache.integrations.fp8")

LAYOUT = ModelLayout("m", (ObjectGroup((2, 3, 4, 8, 16), "bfloat16"),), chunk_tokens=8, revision="r")


def rounded(kv):
    """What is left of KV."""
    scales, into = torch.empty(kv.shape[:-2]), torch.empty(kv.shape, dtype=torch.float8_e4m3fn)
    fp8.to_fp8(kv, scales, into)
    return fp8.from_fp8(scales, into, kv.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_number_is_off_by_a_sixteenth_or_by_a_little_of_the_largest_of_its_head(dtype) -> None:
    torch.manual_seed(0)
    kv = torch.randn(2, 3, 4, 64, 16).to(dtype)
    kv[0] *= 1000  # keys may be far larger than values
    kv[:, :, 1] /= 1000  # and one head far smaller than the next
    largest = kv.float().abs().amax(dim=(-2, -1), keepdim=True)
    # Three bits of mantissa, or half of the smallest step of e4m3, which is 2**-9 where the largest number is 448.
    bound = torch.maximum(kv.float().abs() / 16, largest / 448 * 2**-10) * 1.02
    assert ((rounded(kv).float() - kv.float()).abs() <= bound).all()
    assert (rounded(kv) != kv).any()


def test_zeros_the_largest_and_the_tiniest_numbers_stay_finite() -> None:
    kv = torch.zeros(2, 4, 8)
    kv[1, 0] = torch.finfo(torch.float32).max
    kv[1, 1] = -torch.finfo(torch.float32).max
    assert torch.equal(rounded(kv)[0], kv[0])
    assert torch.allclose(rounded(kv)[1], kv[1], rtol=1e-6)
    tiny = torch.full((1, 4, 8), 1e-44)
    assert torch.isfinite(rounded(tiny)).all()


def test_the_layout_is_another_one_in_everything_that_is_hashed() -> None:
    layout = fp8.fp8_layout(LAYOUT)
    scales, numbers = layout.groups
    assert (scales.shape, scales.dtype) == ((2, 3, 4), "float32")
    assert (numbers.shape, numbers.dtype) == ((2, 3, 4, 8, 16), "float8_e4m3fn")
    assert layout.block_bytes[0] < LAYOUT.block_bytes[0] * 0.52
    tokens = list(range(32))
    assert not set(layout.prompt(tokens).chunk_hashes) & set(LAYOUT.prompt(tokens).chunk_hashes)
    other = fp8.fp8_layout(ModelLayout("m", (ObjectGroup((2, 3, 4, 8, 16), "float16"),), chunk_tokens=8, revision="r"))
    assert not layout.same_bytes(other)


@pytest.mark.parametrize("group", [ObjectGroup((8, 16), "bfloat16"), ObjectGroup((2, 8, 16), "int8")])
def test_what_is_no_kv_of_floats_is_refused(group) -> None:
    with pytest.raises(ValueError, match="fp8 is for floats of shape"):
        fp8.fp8_layout(ModelLayout("m", (group,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["embedded", "mapped", "framed"])
async def test_a_prompt_is_prefilled_from_fp8_alike_and_never_found_by_who_wants_it_exact(place, dtype) -> None:
    model = make_model(dtype)
    logits, kv = await compute_cold(model)
    async with open_cache(MemoryBackend(), place=place) as cache:
        lossy, exact = make_prefix(cache, model, fp8=True), make_prefix(cache, model)
        await fill_l2(cache, lossy, kv)
        for of_l2 in (3, 0):  # out of the store, then out of memory
            again, loaded, result = await lossy.prefill(TOKENS)
            assert (result.chunks, result.l2_chunks) == (3, of_l2)
            for layer, was in zip(loaded.layers, kv.layers, strict=True):
                prefix = was.keys[:, :, : 3 * CHUNK]
                assert layer.keys.dtype == dtype
                assert not torch.equal(layer.keys[:, :, : 3 * CHUNK], prefix)
                assert torch.allclose(layer.keys[:, :, : 3 * CHUNK], prefix, rtol=0.07, atol=0.01)
            assert torch.allclose(again, logits, atol=0.05)
            assert (await exact.prefill(TOKENS)).result.chunks == 0
        await fill_l2(cache, exact, kv)
        found, _, result = await exact.prefill(TOKENS)
        assert (result.chunks, result.l2_chunks) == (3, 3)
        assert torch.equal(found, logits)
