"""Which sequences of a batch share their first pages."""

from __future__ import annotations

import pytest
from sharing import batch, random_batch

from vllm_sparse.kernels.shared_prefix import room, shared_prefixes

PAGE = 16


def found(table, starts, lens, members=4, fewest=64, page=PAGE):
    return shared_prefixes(table, starts, lens, page=page, members=members, fewest=fewest)


def tiles(shared) -> dict[tuple[int, ...], int]:
    """Keys by the sequences that share them."""
    return {
        tuple(s for s in row if s >= 0): keys
        for row, keys in zip(shared.members.tolist(), shared.tile_keys.tolist(), strict=True)
        if keys
    }


def test_two_prompts_and_a_stranger():
    """Sequences of two prefixes in turns, and one of its own: each prefix is a tile."""
    shared = found(*batch([(0, 10, 300), (1, 20, 400), (0, 10, 290), None, (1, 20, 333)]))
    assert tiles(shared) == {(0, 2): 128, (1, 4): 320}  # 160 keys are two blocks of 64 and a half
    assert shared.keys.tolist() == [128, 320, 128, 0, 320]


def test_a_large_group_is_cut_and_what_remains_alone_shares_nothing():
    shared = found(*batch([(0, 8, 200)] * 9))
    assert tiles(shared) == {(0, 1, 2, 3): 128, (4, 5, 6, 7): 128}
    assert shared.keys.tolist() == [128] * 8 + [0]


def test_a_tile_shares_what_all_of_it_have():
    table, starts, lens = batch([(0, 30, 600), (0, 30, 600), (0, 30, 600)])
    table[2, 9] = 999  # from key 144 on it goes its own way
    assert tiles(found(table, starts, lens)) == {(0, 1, 2): 128}
    table[2, 2] = 998  # what is left is not worth it
    shared = found(table, starts, lens)
    assert tiles(shared) == {}
    assert not shared.keys.any()


def test_a_prefix_ends_before_the_first_query():
    """The shared keys are seen by every row: no row's own position lies among them."""
    shared = found(*batch([(0, 8, 130), (0, 8, 135)], queries=[1, 8]))
    assert tiles(shared) == {(0, 1): 64}  # 127 keys end in page 7
    assert tiles(found(*batch([(0, 8, 130), (0, 8, 136)], queries=[1, 8]))) == {(0, 1): 128}
    assert tiles(found(*batch([(0, 8, 130), (0, 8, 135)], queries=[1, 8]), fewest=65)) == {}


def test_rows_that_are_padding_take_no_part():
    table, starts, lens = batch([(0, 8, 200)] * 4, queries=[1, 1, 0, 0])
    assert tiles(found(table, starts, lens)) == {(0, 1): 128}
    starts[2:] = starts[1]
    assert tiles(found(table, starts, lens)) == {}


@pytest.mark.parametrize("page", [16, 32, 128, 192])
def test_what_is_said_to_be_shared_is(page):
    """Against the batch itself, however pages and blocks of 64 lie to each other."""
    for seed in range(20):
        table, starts, lens = random_batch(11, page, seed)
        shared = found(table, starts, lens, page=page)
        for members, keys in tiles(shared).items():
            assert keys >= 64
            assert keys % 64 == 0
            pages = table[list(members), : -(-keys // page)]
            assert (pages == pages[0]).all()
            assert (keys <= lens - (starts[1:] - starts[:-1]))[list(members)].all()
            assert (shared.keys[list(members)] == keys).all()
        assert int((shared.keys > 0).sum()) == sum(len(members) for members in tiles(shared))


def test_every_shared_page_is_found_where_there_is_room():
    """Of a group that all share 20 pages, every pair is told."""
    for count in range(2, 17):
        shared = found(*batch([(0, 20, 400)] * count), members=16)
        assert tiles(shared) == {tuple(range(count)): 320}


def test_more_prefixes_than_there_is_room_for():
    given = [(i // 2, 8, 200) for i in range(32)]
    assert room(32, 16) == (4, 16)
    shared = found(*batch(given), members=16)
    assert tiles(shared) == {(2 * i, 2 * i + 1): 128 for i in range(4)}
    assert shared.keys.tolist() == [128] * 8 + [0] * 24


def test_room_follows_from_a_power_of_two_and_grows():
    before = (0, 1)
    for seqs in range(1, 600):
        for members in (1, 2, 4, 16):
            z, m = room(seqs, members)
            assert (z, m) == room(1 << (seqs - 1).bit_length(), members)
            assert z <= seqs
            assert m <= members
            assert z * m <= 4 * seqs
        assert z >= before[0]
        assert m >= before[1]
        before = z, m


def test_one_sequence_and_none():
    assert tiles(found(*batch([(0, 8, 200)]))) == {}
    assert tiles(found(*batch([]))) == {}


def test_fewest_is_a_number_of_keys():
    with pytest.raises(ValueError, match="fewest: got 0; give 1 or more keys"):
        found(*batch([(0, 8, 200)] * 2), fewest=0)
