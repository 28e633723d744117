"""The nodes of declared patterns: one module per kind, and a line for each here."""

from serve_app.config.patterns import language
from serve_app.orchestrator.patterns.chain import NODES
from serve_app.orchestrator.patterns.nodes import (
    ask,
    branch,
    cascade,
    critique,
    parallel,
    plan,
    refuse,
    retrieve,
    tool,
    verify,
    vote,
)

NODES |= {
    language.AskNode: ask.run,
    language.ToolNode: tool.run,
    language.RetrieveNode: retrieve.run,
    language.BranchNode: branch.run,
    language.ParallelNode: parallel.run,
    language.VoteNode: vote.run,
    language.CascadeNode: cascade.run,
    language.CritiqueNode: critique.run,
    language.PlanNode: plan.run,
    language.VerifyNode: verify.run,
    language.RefuseNode: refuse.run,
}
