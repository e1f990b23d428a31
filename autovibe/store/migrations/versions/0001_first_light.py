"""The first schema: projects, machines, checkpoints, operations, events, keys, and manifest trees."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "allotment",
        sa.Column("vmid", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("owner_uuid", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("vmid"),
    )
    op.create_index("ix_allotment_owner_uuid", "allotment", ["owner_uuid"])
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("secret_hash", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "event",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.String(length=60), nullable=False),
        sa.Column("object_uuid", sa.Uuid(), nullable=False),
        sa.Column("project_uuid", sa.Uuid(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_event_created_at", "event", ["created_at"])
    op.create_index("ix_event_object_uuid", "event", ["object_uuid"])
    op.create_table(
        "hub_key",
        sa.Column("public_key", sa.String(length=400), nullable=False),
        sa.Column("hub", sa.String(length=100), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("public_key"),
    )
    op.create_table(
        "idempotency_key",
        sa.Column("actor", sa.String(length=100), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("request_hash", sa.String(length=64), nullable=False),
        sa.Column("object_kind", sa.String(length=20), nullable=False),
        sa.Column("object_uuid", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("actor", "key"),
    )
    op.create_index("ix_idempotency_key_created_at", "idempotency_key", ["created_at"])
    op.create_table(
        "operation",
        sa.Column("uuid", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("step", sa.String(), nullable=True),
        sa.Column("steps", sa.JSON(), nullable=False),
        sa.Column("progress", sa.String(), nullable=False),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("object_uuid", sa.Uuid(), nullable=False),
        sa.Column("machine_uuid", sa.Uuid(), nullable=True),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("arguments", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("uuid"),
    )
    op.create_index("ix_operation_created_at", "operation", ["created_at"])
    op.create_index("ix_operation_machine_uuid", "operation", ["machine_uuid"])
    op.create_index("ix_operation_object_uuid", "operation", ["object_uuid"])
    op.create_index("ix_operation_status", "operation", ["status"])
    op.create_table(
        "project",
        sa.Column("uuid", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("greediness", sa.Float(), nullable=False),
        sa.Column("daily_money_micros", sa.BigInteger(), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("daily_time_hours", sa.Float(), nullable=True),
        sa.Column("daily_api_calls", sa.Integer(), nullable=True),
        sa.Column("storage_gb", sa.Float(), nullable=True),
        sa.Column("max_concurrent_machines", sa.Integer(), nullable=True),
        sa.Column("current_checkpoint_uuid", sa.Uuid(), nullable=True),
        sa.Column("initial_checkpoint_uuid", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("uuid"),
        sa.UniqueConstraint("name"),
    )
    op.create_index("ix_project_created_at", "project", ["created_at"])
    op.create_table(
        "schema_history",
        sa.Column("revision", sa.String(length=32), nullable=False),
        sa.Column("autovibe", sa.String(length=32), nullable=False),
        sa.Column("migrated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("revision"),
    )
    op.create_table(
        "tree",
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "tree_times",
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("uuid", sa.Uuid(), nullable=False),
        sa.Column("project_uuid", sa.Uuid(), nullable=False),
        sa.Column("parent_uuid", sa.Uuid(), nullable=True),
        sa.Column("machine_uuid", sa.Uuid(), nullable=True),
        sa.Column("type", sa.String(length=20), nullable=False),
        sa.Column("label", sa.String(length=63), nullable=True),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("context", sa.String(), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column("node", sa.String(), nullable=True),
        sa.Column("vmid", sa.Integer(), nullable=True),
        sa.Column("snapshot", sa.String(), nullable=True),
        sa.Column("artefact_kind", sa.String(), nullable=True),
        sa.Column("storage", sa.String(), nullable=True),
        sa.Column("provisioned_for", sa.String(), nullable=True),
        sa.Column("root_digest", sa.String(length=64), nullable=True),
        sa.Column("times_digest", sa.String(length=64), nullable=True),
        sa.Column("file_count", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("unique_bytes", sa.BigInteger(), nullable=False),
        sa.Column("verified_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("operation_uuid", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_uuid"], ["project.uuid"]),
        sa.PrimaryKeyConstraint("uuid"),
        sa.UniqueConstraint("project_uuid", "label", name="uq_checkpoint_label"),
    )
    op.create_index("ix_checkpoint_created_at", "checkpoint", ["created_at"])
    op.create_index("ix_checkpoint_machine_uuid", "checkpoint", ["machine_uuid"])
    op.create_index("ix_checkpoint_parent_uuid", "checkpoint", ["parent_uuid"])
    op.create_index("ix_checkpoint_project_uuid", "checkpoint", ["project_uuid"])
    op.create_index("ix_checkpoint_vmid", "checkpoint", ["vmid"])
    op.create_table(
        "machine",
        sa.Column("uuid", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("type", sa.String(length=63), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("resume_status", sa.String(length=20), nullable=True),
        sa.Column("wanted", sa.String(length=20), nullable=False),
        sa.Column("project_uuid", sa.Uuid(), nullable=False),
        sa.Column("checkpoint_uuid", sa.Uuid(), nullable=True),
        sa.Column("prompt", sa.String(), nullable=True),
        sa.Column("file_modifications", sa.JSON(), nullable=False),
        sa.Column("max_money_micros", sa.BigInteger(), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("max_time_minutes", sa.Float(), nullable=True),
        sa.Column("max_api_calls", sa.Integer(), nullable=True),
        sa.Column("node", sa.String(), nullable=True),
        sa.Column("vmid", sa.Integer(), nullable=True),
        sa.Column("address", sa.String(), nullable=True),
        sa.Column("port", sa.Integer(), nullable=True),
        sa.Column("host_key", sa.String(), nullable=True),
        sa.Column("exit_status", sa.Integer(), nullable=True),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column("progress", sa.String(), nullable=False),
        sa.Column("last_checkpoint_uuid", sa.Uuid(), nullable=True),
        sa.Column("final_checkpoint_uuid", sa.Uuid(), nullable=True),
        sa.Column("operation_uuid", sa.Uuid(), nullable=True),
        sa.Column("termination_reason", sa.String(), nullable=False),
        sa.Column("output_bytes", sa.BigInteger(), nullable=False),
        sa.Column("watched_by", sa.String(), nullable=True),
        sa.Column("watched_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("spawned_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("running_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("terminated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_uuid"], ["project.uuid"]),
        sa.PrimaryKeyConstraint("uuid"),
    )
    op.create_index("ix_machine_name", "machine", ["name"])
    op.create_index("ix_machine_project_uuid", "machine", ["project_uuid"])
    op.create_index("ix_machine_spawned_at", "machine", ["spawned_at"])
    op.create_index("ix_machine_status", "machine", ["status"])
    op.create_index(
        "uq_machine_live_name",
        "machine",
        ["name"],
        unique=True,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_table(
        "machine_output",
        sa.Column("machine_uuid", sa.Uuid(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["machine_uuid"], ["machine.uuid"]),
        sa.PrimaryKeyConstraint("machine_uuid", "start"),
    )
    if op.get_bind().dialect.name == "postgresql":
        # Bodies are stored as they are: compressing them costs more than it saves, see store.nodes.
        op.execute("ALTER TABLE tree ALTER COLUMN body SET STORAGE EXTERNAL")
        op.execute("ALTER TABLE tree_times ALTER COLUMN body SET STORAGE EXTERNAL")
