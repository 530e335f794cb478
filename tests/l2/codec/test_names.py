"""Names: objects that are encoded in different ways never meet."""

import pytest

from async_cache.l2.codec.names import Names
from async_cache.l2.record import file_name, parse_name
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.objects import MAX_OBJECTS_PER_CHUNK
from async_cache.testing.conformance import key


def test_a_name_tells_its_object_and_is_a_name_of_no_other_codec() -> None:
    all_names = [Names(codec, key_id) for codec in ("zstd", "aes", "zstd,aes") for key_id in (b"", b"1" * 8, b"2" * 8)]
    for of in (key(1), key(2, 255, 15), key(3, 0, MAX_OBJECTS_PER_CHUNK - 1)):
        named = [names.name(of) for names in all_names]
        assert len({of, *named}) == len(named) + 1
        for names, name in zip(all_names, named, strict=True):
            assert [other.key(name) for other in all_names] == [of if other is names else None for other in all_names]
            assert names.key(of) is None
            assert parse_name(file_name(name)) == name
            assert names.objects([of[1:]]) == [name[1:]]
            assert name.group < 2**32


def test_the_names_of_a_codec_stay_what_they_are() -> None:
    assert Names("zstd").name(key(1)).group == 125153280
    assert Names("aes", bytes(8)).name(key(1)).group == 1379028992


def test_a_group_that_no_layout_has_is_refused() -> None:
    with pytest.raises(ValueError, match="group 4096 is not in"):
        Names("zstd").name(ObjectKey(bytes(32), 0, 4096))
