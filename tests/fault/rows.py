"""What must be survived, row by row, and which tests show that it is. ``docs/reliability.md`` has the outcome."""

from __future__ import annotations

from dataclasses import dataclass

_DISK = "tests/unit/test_disk.py::test_"
_ENGINE = "tests/integration/test_"
_FAULT = "tests/fault/test_"
_S3 = "tests/conformance/test_origin_s3.py::test_"
_FD = "tests/unit/test_descriptor_socket.py::test_"
_CONFORM = "tests/conformance/test_levels.py::test_"


@dataclass(frozen=True)
class Row:
    """A fault, what the tests do, and the tests: functions, or files for all of theirs.

    ``gap``: what is not tried, or not there yet, and what stands in for it.
    """

    number: int
    fault: str
    done: str
    tests: tuple[str, ...]
    gap: str = ""


_SCRUB = (
    f"{_ENGINE}scrub.py::test_flipped_bytes_at_both_levels_are_mended_without_a_request_and_all_holders_are_told",
    f"{_ENGINE}scrubber.py::test_both_levels_are_read_at_the_rate_and_each_when_it_is_due",
)


ROWS: tuple[Row, ...] = (
    Row(
        1, "SIGKILL at every step",
        "the daemon, and daemon and mover together, killed at the Nth system call (strace), at the Nth step in the "
        "code, and at random instants; each time the next daemon is checked whole",
        (
            f"{_FAULT}kill_points.py",
            f"{_FAULT}kill_movers.py::test_killed_with_the_daemon",
            "tests/crash/test_kills.py",
            "tests/crash/test_standalone_kills.py",
            f"{_ENGINE}restart.py::test_what_a_promotion_had_brought_is_adopted_without_anybody_asking",
        ),
        "That the daemon is ready again within 10 s is measured, here and in row 31, and asserted in no row.",
    ),
    Row(
        2, "Power loss: unsynced writes dropped, torn, or a sync that lied",
        "killed, shared memory removed, unsynced files and a synced blob "
        "zeroed, cut, torn or gone; names come after syncs (strace)",
        (f"{_FAULT}power_loss.py", f"{_DISK}a_commit_syncs_the_bytes_before_the_name_and_the_name_before_it_is_done"),
        "No machine is switched off, and SQLite's own file is not torn: damaging what was not synced stands in.",
    ),
    Row(
        3, "fsync answers EIO, once and always", "the real daemon's fsync fails (strace): bytes, folder, index",
        (f"{_FAULT}disk_errors.py", f"{_DISK}a_commit_that_fails_anywhere_leaves_no_blob"),
    ),
    Row(
        4, "A worker is killed or stopped", "SIGKILL and SIGSTOP of worker processes, at rest and during the pull",
        (
            f"{_ENGINE}attach.py::test_a_killed_workers_lease_ends_and_a_stopped_ones_holds",
            f"{_ENGINE}attach.py::test_a_worker_killed_during_the_pull_does_not_end_it",
            f"{_ENGINE}attach.py::test_a_lease_is_gone_even_if_what_is_done_at_its_end_fails",
        ),
        "That it takes no longer than 2 s is measured and not asserted: no test judges by the clock.",
    ),
    Row(
        5, "The daemon dies while workers are mapped", "SIGKILL and SIGTERM under workers, mapped and waiting",
        (
            f"{_ENGINE}restart.py::test_a_worker_keeps_its_tensors_and_its_lease_over_a_kill",
            f"{_ENGINE}restart.py::test_nothing_is_evicted_before_workers_could_take_up_their_leases",
            f"{_ENGINE}restart.py::test_a_worker_that_waits_for_a_pull_gets_it_from_the_next_daemon",
            f"{_ENGINE}client.py::test_a_restart_is_not_noticed_by_a_worker_with_a_whole_model",
            f"{_ENGINE}client.py::test_a_restart_during_the_download_is_only_a_pause",
            f"{_ENGINE}restart.py::test_a_lease_that_a_limit_refuses_at_first_comes_back_when_there_is_room_for_it",
        ),
    ),
    Row(
        6, "L2 has no room",
        "real ENOSPC on a small tmpfs; a real quota (EDQUOT) of btrfs; both under a mover's writes mid-file (strace)",
        (
            f"{_FAULT}quota.py",
            f"{_ENGINE}limits.py::test_a_disk_too_small_keeps_the_model_in_memory",
            f"{_ENGINE}limits.py::test_a_disk_that_others_fill_is_no_room_and_not_a_failed_pull",
            f"{_DISK}a_full_disk_is_no_room_and_leaves_nothing",
            "tests/unit/test_index.py::test_a_full_disk_is_a_level_error_and_is_made_good_later",
        ),
        "A quota that is used up in the middle of a file is injected: file systems say no when the file is made.",
    ),
    Row(
        7, "/dev/shm or the cgroup is filled by others",
        "a small tmpfs on /dev/shm, filled before and under a pull; a memory cgroup, filled by another process of it",
        (
            f"{_FAULT}memory_cgroup.py::test_a_filled_cgroup_is_a_typed_error_and_no_signal",
            f"{_ENGINE}limits.py::test_shared_memory_smaller_than_configured_bounds_l1",
            f"{_ENGINE}limits.py::test_shared_memory_that_others_fill_under_the_pull_is_an_error_and_no_signal",
            f"{_ENGINE}movers.py::test_a_shortage_of_pages_or_disk_is_an_error_and_kills_nobody",
            "tests/unit/test_shm_pages.py::test_a_full_file_system_is_an_error_and_never_a_signal",
        ),
        "Pages that are written by a system call cannot raise SIGBUS; a worker's mapping has all its pages already. "
        "L2 is fallen back to by asking for it, under a small /dev/shm. No test does so in a full cgroup: there a "
        "mover's buffers have no room either; tried once, it succeeded after the kernel had killed a mover.",
    ),
    Row(
        8, "Bit flip in L2",
        "bytes flipped in files, found by promotion, by verify and by the scrubber, mended by the range",
        (
            f"{_ENGINE}verify.py::test_a_flipped_byte_in_l2_is_found_and_mended_by_one_ranged_get",
            f"{_ENGINE}verify.py::test_damage_in_l2_is_mended_in_both_levels_when_it_is_met_at_promotion",
            f"{_ENGINE}verify.py::test_damage_that_cannot_be_mended_quarantines_until_the_origin_is_back",
            *_SCRUB,
            f"{_ENGINE}scrub.py::test_what_cannot_be_mended_is_quarantined_and_named_until_the_origin_is_back",
            f"{_ENGINE}scrubber.py::test_a_disk_copy_that_takes_no_repair_is_given_up_and_written_again_from_memory",
        ),
    ),
    Row(
        9, "Bit flip in L1",
        "bytes flipped in segments, found by verify, at adoption and by the scrubber at its rate; the holder is told",
        (
            f"{_ENGINE}verify.py::test_a_flipped_byte_in_l1_is_mended_from_l2_and_the_holder_is_told",
            f"{_ENGINE}verify.py::test_damage_in_l1_that_cannot_be_mended_is_not_handed_out",
            f"{_ENGINE}restart.py::test_a_flipped_byte_in_memory_is_found_at_adoption_and_mended_from_l2",
            *_SCRUB,
            f"{_ENGINE}scrubber.py::test_other_bytes_of_the_origin_never_get_into_memory_that_somebody_has_mapped",
        ),
    ),
    Row(
        10, "S3: 503, 429, slow, hang, reset", "a fault proxy before a real server",
        (
            f"{_ENGINE}pull_faults.py::test_passing_failures_of_the_origin_are_borne",
            f"{_ENGINE}pull_faults.py::test_an_origin_that_hangs_is_left_after_its_stall_deadline",
            f"{_ENGINE}pull_faults.py::test_a_slow_origin_is_no_failure_and_other_pulls_go_on",
            f"{_ENGINE}pull_faults.py::test_a_failure_that_stays_is_told_and_what_was_verified_is_kept",
            f"{_S3}a_silent_server_times_out",
        ),
    ),
    Row(
        11, "S3: short body, wrong Content-Length or Content-Range, the whole object for a range",
        "a fault proxy before two real servers; what stays wrong is asked for as often as is configured and no more",
        (
            f"{_ENGINE}pull_faults.py::test_an_answer_that_stays_wrong_is_asked_for_three_times_and_no_more",
            f"{_S3}a_fault_is_the_right_error_once_and_then_forgotten",
            f"{_S3}ranges_are_judged_by_what_they_say",
        ),
    ),
    Row(
        12, "The object is replaced mid-pull", "stored anew under a held range, on servers with and without If-Match",
        (
            f"{_ENGINE}pull_faults.py::test_an_object_replaced_under_the_pull_restarts_that_blob",
            f"{_ENGINE}pull_faults.py::test_an_etag_that_changes_between_ranges_is_never_mixed",
            f"{_ENGINE}restart.py::test_an_object_that_was_replaced_between_is_fetched_whole",
        ),
    ),
    Row(
        13, "Credentials expire, clocks are wrong or jump",
        "expired in the middle of a pull, renewed or not; a clock that the store refuses; jumps of an injected clock",
        (
            f"{_ENGINE}pull_faults.py::test_credentials_that_expire_in_the_middle_are_read_once_more",
            f"{_ENGINE}pull_faults.py::test_what_is_here_is_served_while_credentials_are_refused",
            f"{_ENGINE}timed.py::test_a_clock_that_jumps_ends_no_lease_and_no_keep_alive",
            f"{_ENGINE}pull_faults.py::test_refused_credentials_in_the_middle_are_an_error_at_once",
            f"{_ENGINE}pull.py::test_wrong_credentials_are_named_and_a_retry_with_right_ones_works",
            f"{_ENGINE}timed.py::test_a_clock_that_jumps_moves_into_and_out_of_windows",
            f"{_ENGINE}doctor.py::test_a_clock_that_differs_from_the_stores",
        ),
        "The host's own clock is not set: the injected one stands in.",
    ),
    Row(
        14, "S3 unreachable at boot", "restarted with no server behind the address",
        (f"{_ENGINE}restart.py::test_everything_here_is_served_when_the_origin_is_gone",),
    ),
    Row(
        15, "A second daemon on the same state or socket",
        "started beside the first; after SIGKILL; lock not inherited",
        (
            f"{_ENGINE}daemon_lifecycle.py::test_a_second_daemon_refuses_and_names_the_first",
            f"{_ENGINE}daemon_lifecycle.py::test_sockets_of_a_killed_daemon_do_not_matter",
            "tests/unit/test_daemon_edges.py::test_the_lock_is_not_inherited_and_follows_no_link",
        ),
        "That it ends within 1 s is measured and not asserted: no test judges by the clock.",
    ),
    Row(
        16, "Unknown files, older and newer formats",
        "foreign files in both levels, every layout that ever was, newer ones",
        (
            f"{_ENGINE}restart.py::test_leftovers_of_ours_are_removed_and_what_is_foreign_is_left_alone",
            f"{_ENGINE}restart.py::test_an_unknown_format_of_l2_is_set_aside",
            f"{_ENGINE}upgrade.py",
            "tests/unit/test_index.py::test_a_newer_format_is_set_aside",
        ),
        "A state folder whose layout as a whole is newer is not set aside: the daemon does not start, and leaves it "
        "alone, so that going back by mistake does not cost the warm cache. The error has the command that sets it "
        "aside.",
    ),
    Row(
        17, "L2 read-only or gone",
        "remounted read-only, also when full, in the middle of a pull and at the start; unmounted and renamed under "
        "the daemon; hanging at the start; a drive of several gone; lost over a restart",
        (
            f"{_ENGINE}limits.py::test_a_disk_that_becomes_read_only_is_reported_and_pulls_go_on_in_memory",
            f"{_ENGINE}limits.py::test_a_full_disk_that_becomes_read_only_goes_on_serving_what_is_on_it",
            f"{_ENGINE}limits.py::test_what_is_damaged_on_a_disk_that_takes_no_mend_is_given_up_and_written_anew",
            f"{_ENGINE}limits.py::test_a_disk_that_becomes_read_only_under_a_pull_fails_no_load",
            f"{_ENGINE}limits.py::test_a_read_only_disk_is_read_at_the_start_whatever_else_lies_on_it",
            f"{_ENGINE}limits.py::test_a_disk_that_goes_away_under_the_daemon_is_reported_and_done_without",
            f"{_ENGINE}daemon_lifecycle.py::test_a_disk_that_hangs_at_the_start_keeps_nobody_from_asking_and_stopping",
            f"{_ENGINE}restart.py::test_l2_is_written_again_from_memory_when_it_was_lost",
            f"{_ENGINE}drives.py",
        ),
    ),
    Row(
        18, "A bad configuration or catalog reload",
        "broken and fuzzed catalogs and settings, under a running daemon and at its start; budgets shrunk under leases",
        (
            f"{_ENGINE}daemon_lifecycle.py::test_the_catalog_is_reloaded_and_a_bad_one_keeps_the_old",
            f"{_ENGINE}catalog_engine.py::test_a_bad_catalog_keeps_the_old_one_and_says_what_is_wrong",
            f"{_ENGINE}daemon_lifecycle.py::test_whatever_a_catalog_holds_the_mended_one_is_read",
            f"{_ENGINE}daemon_lifecycle.py::test_a_daemon_starts_with_a_catalog_that_no_reader_foresaw",
            f"{_ENGINE}daemon_lifecycle.py::test_whatever_the_settings_hold_the_mended_ones_are_read",
            "tests/unit/test_catalog_watch.py",
            "tests/unit/test_readers_fuzz.py",
            f"{_ENGINE}admission.py::test_budgets_change_while_the_daemon_runs",
        ),
    ),
    Row(
        19, "Hostile safetensors headers",
        "a corpus with verdicts, 100,000 fuzzed ones beside the reference library, and memory under the largest",
        (f"{_FAULT}headers.py", "tests/unit/test_safetensors_header.py"),
    ),
    Row(
        20, "Hostile names", "names in keys, in the catalog, in a model's own index and in levels",
        (
            f"{_S3}dots_in_keys_are_refused",
            f"{_S3}folder_keys_are_skipped_and_bad_keys_named",
            f"{_CONFORM}names_that_could_leave_the_level_are_refused",
            "tests/conformance/test_origins.py::test_paths_that_lead_out_are_refused",
            f"{_ENGINE}standalone.py::test_names_that_lead_out_of_the_folder_are_refused",
            f"{_ENGINE}index_names.py",
            "tests/unit/test_catalog_file.py::test_what_is_wrong_is_named",
            "tests/unit/test_catalog_file.py::test_all_problems_are_told_together",
        ),
    ),
    Row(
        21, "Links and FIFOs planted in the cache",
        "planted at every place where a level looks, and in place of journals, locks and the daemon's other files",
        (
            f"{_CONFORM}what_was_planted_under_a_blobs_name_is_never_served",
            f"{_CONFORM}a_planted_ingest_is_neither_overwritten_nor_followed",
            f"{_CONFORM}a_file_with_a_second_name_is_not_ours",
            f"{_CONFORM}a_file_of_another_user_is_not_ours",
            "tests/unit/test_journal.py::test_what_was_planted_is_refused",
            "tests/unit/test_own_files.py",
            "tests/unit/test_rpc_service.py::test_a_file_in_the_socket_s_place_is_left_alone",
        ),
    ),
    Row(
        22, "An unauthorised user; another tenant's model; guessed digests",
        "processes of other users ask for what they may not know of, on every surface: answers compared with those "
        "for what is not there, byte by byte",
        (
            f"{_ENGINE}access.py",
            "tests/unit/test_access_policy.py",
            f"{_FD}who_is_not_on_the_access_list_is_refused",
            f"{_FD}access_goes_by_user_group_or_supplementary_group",
        ),
        "Names of segments in /dev/shm are digests that the host's users can list; docs/security.md says what helps.",
    ),
    Row(
        23, "A malicious client",
        "garbage, idle connections, foreign descriptors, another's token, another's lease, a lease given back twice",
        (
            f"{_FAULT}hostile_clients.py",
            f"{_FD}garbage_ends_only_its_own_connection",
            f"{_FD}a_wrong_token_is_told_and_the_connection_goes_on",
            f"{_FD}descriptors_that_a_peer_sends_are_not_kept",
        ),
    ),
    Row(
        24, "A client writes to its descriptor", "read-only descriptors, private mappings",
        (
            f"{_CONFORM}descriptors_are_read_only_and_not_inherited",
            f"{_CONFORM}writes_to_a_private_mapping_stay_private",
        ),
    ),
    Row(
        25, "File modes", "both levels, sockets and folders under any umask",
        (
            f"{_CONFORM}files_are_private_whatever_the_umask",
            f"{_FD}the_socket_has_its_mode_and_goes_with_the_server",
            "tests/unit/test_daemon_edges.py::test_folders_are_made_with_their_mode_whatever_the_umask",
            f"{_ENGINE}modes.py",
        ),
    ),
    Row(
        26, "Floods, slow clients, oversized messages",
        "each user's limits of connections, calls, leases, streams and descriptors, others and health beside it; "
        "four users that flood for minutes; oversized messages",
        (
            f"{_FAULT}floods.py",
            f"{_FAULT}hostile_clients.py",
            f"{_FD}one_user_cannot_take_all_connections",
            "tests/unit/test_rpc_pacing.py::test_a_slow_watcher_loses_the_oldest_and_is_told_how_many",
        ),
    ),
    Row(
        27, "1,000 concurrent attaches",
        "1,000 at once over 50 connections, cold and warm, under a limit of 1,024 descriptors",
        (
            f"{_FAULT}thousand.py",
            f"{_ENGINE}attach.py::test_hundreds_of_attaches_at_once_make_one_download_and_leave_nothing",
            f"{_ENGINE}attach.py::test_eight_workers_that_attach_cold_cause_one_download_and_share_one_copy",
        ),
    ),
    Row(
        28, "A model larger than a level; everything leased", "refused at once, or by a transient segment",
        (
            f"{_ENGINE}evict.py::test_what_can_never_fit_is_refused_at_once_and_nothing_goes",
            f"{_ENGINE}admission.py::test_a_stranger_is_served_beside_the_budget_and_goes_with_its_last_lease",
            f"{_ENGINE}evict.py::test_cold_goes_before_warm_and_leased_pinned_and_hot_never_go",
        ),
    ),
    Row(
        29, "Evict races attach", "both at once, many times; random histories of everything",
        (
            f"{_ENGINE}evict.py::test_a_lease_that_comes_while_an_eviction_is_asked_for_wins_or_finds_nothing",
            f"{_ENGINE}histories.py",
        ),
    ),
    Row(
        30, "The event loop hangs",
        "held up under a socket like the service manager's: silent, so that the watchdog acts, whose signal it then "
        "gets; an origin that hangs holds nothing up",
        (
            f"{_ENGINE}service_manager.py::test_a_loop_that_is_held_up_is_silent_and_tells_where",
            f"{_ENGINE}service_manager.py::test_an_origin_that_hangs_holds_up_no_sign_of_life",
        ),
        "The restart by a real systemd needs root: `make test-systemd`.",
    ),
    Row(
        31, "SIGTERM, OOM kill, removal, restart",
        "drained and killed, with pulls under way; killed by the kernel in a memory cgroup that is full; all "
        "processes, the cgroup and the sockets' folder of a container removed",
        (
            f"{_FAULT}memory_cgroup.py::test_a_daemon_that_is_killed_for_want_of_memory_adopts_l1_and_its_leases",
            f"{_FAULT}memory_cgroup.py::test_a_container_that_is_removed_and_made_anew_adopts_l1_and_its_leases",
            f"{_ENGINE}restart.py::test_a_pull_goes_on_after_a_restart_and_fetches_only_what_was_not_verified",
            f"{_ENGINE}restart.py::test_a_quick_pull_is_finished_before_the_daemon_ends",
            f"{_ENGINE}restart.py::test_what_is_in_memory_is_adopted_without_reading_l2_or_l3",
            f"{_ENGINE}daemon_lifecycle.py::test_sigterm_drains_and_leaves_no_socket",
        ),
        "`systemctl restart` needs root and systemd-nspawn: `make test-systemd`. No container runtime is used here.",
    ),
    Row(
        32, "A mover is killed, hangs or lacks memory",
        "real movers, killed, stopped, talking nonsense, dying again and again, killed at the Nth system call "
        "(strace), killed by the kernel in a memory cgroup that is full",
        (
            f"{_FAULT}kill_movers.py::test_killed_alone_nobody_notices",
            f"{_FAULT}memory_cgroup.py::test_a_mover_that_is_killed_for_want_of_memory_costs_only_its_ranges",
            f"{_ENGINE}mover_pool.py",
            f"{_ENGINE}pull_faults.py::test_a_mover_killed_under_a_pull_costs_only_its_ranges",
            f"{_ENGINE}pull_faults.py::test_movers_that_keep_dying_become_one_clear_error",
        ),
        "An allocation that fails within a mover (RLIMIT_AS) is not tried: a host that overcommits kills instead.",
    ),
)  # fmt: skip


def covering(node_id: str) -> list[int]:
    """Numbers of the rows that a test covers."""
    name = node_id.partition("[")[0]
    return [row.number for row in ROWS if name in row.tests or name.partition("::")[0] in row.tests]
