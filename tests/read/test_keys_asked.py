"""The keys of very many objects are made as they are looked at, and are those that would be made at once."""

from hypothesis import given
from hypothesis import strategies as st

from async_cache import ModelLayout, ObjectGroup
from async_cache.read.lookup import Asked, _ManyKeys

LAYOUT = ModelLayout("m", tuple(ObjectGroup((1,), "uint8") for _ in range(3)), chunk_tokens=1, world_size=2)


@given(st.lists(st.integers(0, 63), min_size=1, max_size=40), st.integers(0, 250), st.integers(0, 250))
def test_any_slice_of_the_keys_is_that_of_all_of_them(masks, begin, end):
    hashes = [number.to_bytes(32, "big") for number in range(len(masks))]
    asked = Asked(LAYOUT, hashes, dict(enumerate(masks)))
    all_of_them, many = asked.keys_of(asked.masks), _ManyKeys(asked)
    assert len(many) == len(all_of_them) and list(many) == all_of_them
    assert many[begin:end] == all_of_them[begin:end]
    assert all(many[number] == key for number, key in enumerate(all_of_them))
