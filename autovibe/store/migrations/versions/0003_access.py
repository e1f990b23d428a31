"""Access: roles, projects, scopes and the life of API keys; the audit log; leases of rate limits.

Existing keys become admin keys and keep their plain hash until they are used next.
"""

from __future__ import annotations

from uuid import uuid4

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _upgrade_keys()
    op.create_table(
        "server_key",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("key_hex", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "audit_entry",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("actor", sa.String(length=100), nullable=False),
        sa.Column("key_id", sa.String(length=16), nullable=False),
        sa.Column("verb", sa.String(length=120), nullable=False),
        sa.Column("object_kind", sa.String(length=20), nullable=False),
        sa.Column("object_uuid", sa.Uuid(), nullable=True),
        sa.Column("project_uuid", sa.Uuid(), nullable=True),
        sa.Column("outcome", sa.String(length=10), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("client", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    for column in ("created_at", "object_uuid", "project_uuid"):
        op.create_index(f"ix_audit_entry_{column}", "audit_entry", [column])
    op.create_table(
        "rate_lease",
        sa.Column("bucket", sa.String(length=40), nullable=False),
        sa.Column("minute", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("taken", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("bucket", "minute"),
    )
    op.create_index("ix_rate_lease_minute", "rate_lease", ["minute"])


def _upgrade_keys() -> None:
    for column in (
        sa.Column("uuid", sa.Uuid(), nullable=True),
        sa.Column("scheme", sa.String(length=16), nullable=False, server_default=sa.text("'sha256'")),
        sa.Column("role", sa.String(length=10), nullable=False, server_default=sa.text("'admin'")),
        sa.Column("project_uuid", sa.Uuid(), nullable=True),
        sa.Column("machine_uuid", sa.Uuid(), nullable=True),
        sa.Column("scopes", sa.String(length=1000), nullable=False, server_default=sa.text("''")),
        sa.Column("created_by", sa.String(length=100), nullable=False, server_default=sa.text("''")),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
    ):
        op.add_column("api_key", column)
    keys = sa.table("api_key", sa.column("id", sa.String()), sa.column("uuid", sa.Uuid()))
    connection = op.get_bind()
    for identifier in connection.execute(sa.select(keys.c.id)).scalars().all():
        connection.execute(keys.update().where(keys.c.id == identifier).values(uuid=uuid4()))
    with op.batch_alter_table("api_key") as batch:
        batch.alter_column("uuid", existing_type=sa.Uuid(), nullable=False)
    op.create_index("uq_api_key_uuid", "api_key", ["uuid"], unique=True)
    op.create_index("ix_api_key_project_uuid", "api_key", ["project_uuid"])
    op.create_index("ix_api_key_machine_uuid", "api_key", ["machine_uuid"])
