"""The first look at a GPU: a choice of the kernels' tests, in bfloat16, float16 and FP8.

The tests are those of `tests/gpu`, by pytest, on as many cores as there are where pytest-xdist is
installed: what takes time is Triton's compiler, 0.1 to 1.9 seconds for each of some 230 forms of
kernels, more than three minutes of one core. The choice has every kernel but those of CoPE, each
kind of adversarial case, head sizes 64 to 256, and the three softmax modes; the whole folder is
`pytest tests/gpu`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks._form import ROOT, needs_a_gpu

NEEDS_A_GPU = needs_a_gpu("benchmarks._gpu_smoke")
NEEDS_PYTEST = "benchmarks._gpu_smoke needs pytest, which is not installed: pip install pytest"
SPARE_CORES = 4  # for what the suite runs beside it
TEST_TIMEOUT_S = 60
# By file: tests with all their cases, or one case of them.
CHOICE: dict[str, tuple[str, ...]] = {
    "test_prefill_gpu": (
        "test_lengths[1-bf16]", "test_lengths[65-fp16]", "test_lengths[65-bf16]",
        "test_lengths[2000-fp16]", "test_lengths[2000-bf16]", "test_shapes",
        "test_token_major_pages_and_strided_queries",
        "test_chunks_give_what_the_whole_prompt_gives",
        "test_rows_that_select_nothing", "test_no_queries_and_no_keys",
        "test_invalid_entries_are_ignored", "test_lists_that_are_longer_than_what_they_hold",
        "test_a_query_before_all_its_selected_keys",
        "test_either_pairing_reads_what_each_list_selects", "test_a_window", "test_sinks",
        "test_logit_regimes", "test_two_halves_merge_into_the_whole",
    ),
    "test_decode_gpu": (
        "test_lengths", "test_shapes", "test_layouts", "test_regimes",
        "test_the_guard_fires_exactly_where_it_should",
        "test_a_part_that_vanishes_is_no_reason_to_flag", "test_several_queries_a_sequence",
        "test_more_rows_than_a_program_takes", "test_windows[20-online]",
        "test_windows[130-unified]", "test_sinks", "test_a_sequence_without_keys_and_padding",
        "test_a_workspace_serves_launch_after_launch", "test_a_captured_graph_follows_the_lengths",
    ),
    "test_shared_prefix_gpu": (
        "test_found_as_on_the_cpu", "test_long_prefixes_and_more_of_them_than_there_is_room_for",
        "test_two_prefixes_and_a_stranger", "test_shapes", "test_padding_and_unwritten_rows",
        "test_regimes", "test_rows_that_leave_phi_in_one_part_only", "test_sinks",
        "test_a_workspace_is_left_clean",
    ),
    "test_fp8_gpu": (
        "test_prefill", "test_prefill_with_a_window_and_sinks", "test_mean_correction[bf16]",
        "test_decode[bf16-online-1]", "test_decode[bf16-online-1000]",
        "test_decode[bf16-lazy-1000]", "test_decode[bf16-unified-1000]",
        "test_decode[fp16-online-1000]", "test_decode[fp16-unified-1000]",
        "test_decode_of_other_heads", "test_phi_is_of_logits_with_the_keys_scale[10000]",
        "test_row_scores", "test_block_means_from_keys_and_from_kept_sums",
        "test_the_host_does_not_look_at_scales", "test_write_kv",
    ),
    "test_planning_gpu": (
        "test_row_scores", "test_row_scores_of_a_logit_that_is_not_finite",
        "test_block_means_from_keys_and_from_kept_sums[200-16]",
        "test_block_means_from_keys_and_from_kept_sums[65-64]",
        "test_block_means_from_keys_and_from_kept_sums[200-128]",
        "test_sums_forget_what_a_page_held_before", "test_index_lists",
        "test_index_lists_of_several_sequences_and_ranges", "test_write_kv",
        "test_the_host_does_not_look_between_queries_and_output",
    ),
    "test_searches_gpu": (
        "test_window_and_heads_without_hope", "test_columns", "test_threshold",
        "test_what_is_not_finite_covers_nothing", "test_sort_columns", "test_line_sums",
        "test_last_rows", "test_last_rows_of_heads_that_read_everything",
    ),
    "test_left_out_gpu": (
        "test_lengths[1-bf16]", "test_lengths[129-bf16]", "test_lengths[1000-fp16]",
        "test_lengths[1000-bf16]", "test_shapes", "test_sinks_take_part_beside_means",
        "test_more_left_out_blocks_and_columns_than_are_taken_at_once",
        "test_invalid_and_repeated_entries_are_ignored",
    ),
    "test_linear_gpu": (
        "test_rows[gemv-1-bf16]", "test_rows[gemv-2-fp16]", "test_rows[gemv-3-bf16]",
        "test_rows[gemv-4-fp16]", "test_rows[gemv-9-bf16]", "test_rows[flat_gemm-1-fp16]",
        "test_rows[flat_gemm-8-bf16]", "test_rows[flat_gemm-16-fp16]",
        "test_rows[flat_gemm-33-bf16]", "test_rows[flat_gemm-65-bf16]",
        "test_rows_of_wider_tensors[gemv-3-1024-bf16]",
        "test_rows_of_wider_tensors[flat_gemm-7-1000-bf16]",
        "test_nothing_beside_the_output_is_written", "test_each_size_of_a_gemv_tile",
        "test_wide_tiles_of_a_flat_gemm", "test_splits[2-640-5-bf16]",
        "test_splits[65-600-1000-fp16]", "test_rows_do_not_depend_on_their_neighbours",
        "test_a_captured_graph_follows_the_activations",
    ),
}  # fmt: skip


class Ran:
    """A plugin of pytest that counts the tests which ran."""

    def __init__(self) -> None:
        self.tests = 0

    def pytest_runtest_logreport(self, report) -> None:
        self.tests += 1


def tests(file: str) -> list[str]:
    """What is chosen of a file, as pytest's arguments."""
    return [f"tests/gpu/{file}.py::{name}" for name in CHOICE[file]]


def run(files: Iterable[str], options: list[str]) -> int:
    """pytest's status for the choice of these files.

    pytest runs nothing where one file cannot be imported (FP8's asks for vLLM): each file is run by
    itself then.
    """
    import pytest

    files, ran = list(files), Ran()
    chosen = [one for file in files for one in tests(file)]
    status = int(pytest.main([*chosen, *options], plugins=[ran]))
    if ran.tests or not status or len(files) == 1:
        return status
    print("Nothing ran: once more, file by file", flush=True)
    return max(run([file], options) for file in files)


def arguments(cores: int) -> list[str]:
    """Of pytest, beside the tests."""
    given = ["-v", "--tb=short", "-rf", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    if _has("pytest_timeout"):
        given += [f"--timeout={TEST_TIMEOUT_S}"]
    if _has("xdist"):
        # Each worker compiles forms of its own, and finds those of others in Triton's cache.
        given += ["-n", str(max(cores - SPARE_CORES, 2)), "--dist", "worksteal"]
    else:
        print("pytest-xdist is not installed: one test after another, which takes its time")
    return given


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def main() -> int:
    # Not the checkout itself: its `kernels` is the name of a package that transformers looks for.
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    os.chdir(ROOT)
    if not _has("pytest"):
        print(NEEDS_PYTEST, file=sys.stderr)
        return 1
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each worker, for the reference on the CPU
    import torch

    if not torch.cuda.is_available():
        print(NEEDS_A_GPU, file=sys.stderr)
        return 2
    return run(CHOICE, arguments(os.cpu_count() or 1))


if __name__ == "__main__":
    raise SystemExit(main())
