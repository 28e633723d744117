"""The store: API keys, outcomes, feedback; SQLite by default, PostgreSQL on a cluster."""

from serve_app.store.database import Store
from serve_app.store.feedback import (
    RatedRequest,
    Verdict,
    add_feedback,
    rated_requests,
    read_verdicts,
    verdict_ids,
)
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
    Mode,
    Policy,
    SnapshotInfo,
    add_snapshot,
    find_policy,
    list_policies,
    list_snapshots,
    publish,
    serving_policies,
    trial_policies,
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
    "Mode",
    "OutcomeLog",
    "Policy",
    "ProfileOutcome",
    "ProfileQuestion",
    "RatedRequest",
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
    "find_policy",
    "get_job",
    "hash_key",
    "list_jobs",
    "list_keys",
    "list_policies",
    "list_snapshots",
    "measured",
    "publish",
    "rated_requests",
    "read_profile",
    "read_verdicts",
    "revoke_key",
    "serving_policies",
    "trial_policies",
    "update_job",
    "verdict_ids",
]
