"""The store: API keys, outcomes, feedback; SQLite by default, PostgreSQL on a cluster."""

from serve_app.store.database import Store
from serve_app.store.feedback import Verdict, add_feedback, read_verdicts, verdict_ids
from serve_app.store.jobs import Job, add_job, get_job, list_jobs, update_job
from serve_app.store.keys import (
    ApiKey,
    Scope,
    create_key,
    find_key,
    hash_key,
    list_keys,
    revoke_key,
)
from serve_app.store.outcomes import OutcomeLog
from serve_app.store.policies import (
    Policy,
    SnapshotInfo,
    add_snapshot,
    list_snapshots,
    publish,
    serving_policies,
)
from serve_app.store.profiles import (
    ProfileOutcome,
    ProfileQuestion,
    add_outcomes,
    add_questions,
    measured,
    read_profile,
)

__all__ = [
    "ApiKey",
    "Job",
    "OutcomeLog",
    "Policy",
    "ProfileOutcome",
    "ProfileQuestion",
    "Scope",
    "SnapshotInfo",
    "Store",
    "Verdict",
    "add_feedback",
    "add_job",
    "add_outcomes",
    "add_questions",
    "add_snapshot",
    "create_key",
    "find_key",
    "get_job",
    "hash_key",
    "list_jobs",
    "list_keys",
    "list_snapshots",
    "measured",
    "publish",
    "read_profile",
    "read_verdicts",
    "revoke_key",
    "serving_policies",
    "update_job",
    "verdict_ids",
]
