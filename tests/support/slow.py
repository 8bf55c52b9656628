"""The tests that continuous integration leaves out: its 20 minutes on two processors would not do for them.

`scripts/test.sh` runs them, and `scripts/test.sh -m slow` runs nothing else. Each of them takes more than ten seconds
beside two others, and another test that stays shows that its subject works at all.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

MARK = "slow"
SLOW = {
    "backends/aot_inductor/test_backend.py": [
        "test_a_dimension_of_one_or_two_and_a_module_with_dicts",
        "test_checks_leave_no_trace_in_the_model_that_serves",
        "test_model_that_changes_its_input_is_compiled",
        "test_module_that_somebody_holds_is_left_as_it_was",
    ],
    "backends/aot_inductor/test_build.py": [
        "test_constant_that_the_model_derives_is_that_of_the_new_weights",
        "test_entry_that_claims_what_was_declared_is_read_by_its_variants",
        "test_model_that_fits_no_range_gets_one_variant_for_each_warmup_size",
        "test_model_without_dynamic_dimensions_has_one_static_variant",
        "test_no_instruction_set_is_tried_with_the_compiler",
        "test_nothing_is_taken_from_or_left_in_the_compilers_shared_folder",
        "test_number_that_the_model_derives_is_no_longer_that_of_the_build",
        "test_tensors_in_the_code_and_numbers_in_the_output",
        "test_weights_that_the_model_changes_are_taken_from_the_model",
    ],
    "backends/aot_inductor/test_container.py": [
        "test_a_start_that_builds_places_each_weight_once",
        "test_operators_without_a_c_interface_take_torchs_runner",
    ],
    "backends/aot_inductor/test_full_disk.py": [
        "test_a_full_disk_ends_no_process_and_the_build_goes_on_when_there_is_room",
    ],
    "backends/aot_inductor/test_linears.py": [
        "test_a_failure_of_the_pass_fails_no_build",
        "test_a_model_that_cannot_do_with_parts_is_built_without_merging",
        "test_a_start_that_builds_keeps_nothing_of_the_module",
        "test_a_variant_for_size_one",
        "test_exported_programs_stay_as_they_are",
        "test_two_loads_in_16_bits",
        "test_variants_share_the_merged_weights",
        "test_variants_that_would_merge_differently_are_left_alone",
        "test_weights_that_the_model_changes_are_taken_from_the_model",
    ],
    "backends/aot_inductor/test_outside.py": [
        "test_each_value_has_an_artifact_and_a_restart_builds_nothing",
    ],
    "backends/tensorrt/rtx/test_engine_cache.py": [
        "test_a_model_without_a_graph_for_a_range_gets_one_for_each_size",
        "test_a_second_start_finds_every_engine",
        "test_graphs_that_differ_have_keys_of_their_own",
        "test_keys_do_not_depend_on_the_hash_seed",
        "test_new_weights_get_engines_of_their_own",
        "test_operators_left_in_torch_are_counted",
        "test_the_same_graphs_share_a_key_upstream",
        "test_what_cannot_be_done_is_said",
        "test_what_else_changes_a_key",
    ],
    "backends/tensorrt/rtx/test_refit.py": [
        "test_a_function_of_a_weight_is_no_copy_of_it",
        "test_formulas_give_the_weights_of_a_network_that_they_have_not_seen",
    ],
    "backends/tensorrt/test_torch_tensorrt_import.py": [
        "test_the_reason_is_told_and_nobody_tries_again",
    ],
    "backends/test_operators.py": [
        "test_entry_stays_where_what_registers_its_operators_is_missing",
        "test_operators_that_the_constructor_registers_are_a_reason_not_to_export",
    ],
    "execution/test_runner.py": [
        "test_thousands_of_schedules",
    ],
    "execution/test_slots.py": [
        "test_compiled_models_answer_right_from_four_threads",
    ],
    "model/test_exported.py": [
        "test_an_artifact_is_as_narrow_as_what_is_declared",
        "test_an_unbounded_dimension",
    ],
    "model/test_values.py": [
        "test_an_index_that_is_out_of_range_does_not_end_the_process",
    ],
    "model_process/test_silence.py": [
        "test_a_call_is_not_blamed_for_a_process_that_somebody_stops_twice",
        "test_a_call_that_keeps_the_interpreters_lock_fails_alone",
        "test_a_storm_of_kills_blames_and_loses_no_call",
    ],
    "servers/torchserve/test_generate.py": [
        "test_a_models_own_loop_gets_its_cache_from_the_artifact",
    ],
    "servers/torchserve/test_neighbours.py": [
        "test_a_prediction_with_the_header_of_describe_is_a_prediction",
    ],
    "servers/torchserve/test_prewarm.py": [
        "test_parts_are_built_in_the_background_each_in_a_process",
    ],
    "soak/test_soak.py": [
        "test_files_of_others_that_are_closed_are_found",
        "test_good_artifacts_that_are_blamed_are_found",
        "test_good_entries_that_a_transient_error_costs_are_found",
        "test_innocent_calls_that_are_blamed_are_found",
    ],
    "startup/background/test_failed_builds.py": [
        "test_child_is_nice_and_a_killed_one_changes_nothing",
    ],
    "startup/test_compile_after_ready.py": [
        "test_other_requests_are_not",
    ],
    "store/remote/test_network_hosts.py": [
        "test_builder_that_is_cut_off_is_taken_over_and_changes_nothing_when_it_comes_back",
        "test_slow_link_is_waited_for_and_a_useless_one_is_not",
    ],
    "torchserve/test_across_workers.py": [
        "test_a_stopped_process_is_replaced_and_no_request_fails",
        "test_handlers_with_a_way_of_their_own_are_shared_too",
    ],
    "torchserve/test_bad_requests.py": [
        "test_a_token_id_that_is_out_of_range_does_not_end_the_worker",
    ],
    "torchserve/test_starts.py": [
        "test_two_models_side_by_side",
    ],
}
"""Names by file, below tests/."""


def mark_all(items: Iterable[pytest.Item]) -> None:
    """Mark the tests that are named above."""
    for item in items:
        if getattr(item, "originalname", item.name) in SLOW.get(_file_of(item), ()):
            item.add_marker(MARK)


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0].removeprefix("tests/")
