"""A short run of `benchmarks.sandbox_soak`: hostile programs and killed servers."""

from __future__ import annotations

from benchmarks.sandbox_soak import judge, run


def test_sandbox_answers_after_hostile_programs_and_killed_servers_and_leaves_nothing() -> None:
    record, remains = run(programs=40, seed=3, deadline_s=0.2)
    assert sum(record.attacks.values()) >= 3
    assert [t.name for t in judge(record, remains, 40)[:5] if not t.holds] == []
