"""Budgets: accounts, reservations, the ledger; what a machine is estimated to use, holds, and costs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("scope", sa.String(length=10), nullable=False),
        sa.Column("owner_uuid", sa.Uuid(), nullable=False),
        sa.Column("period", sa.String(length=10), nullable=False),
        sa.Column("resource", sa.String(length=20), nullable=False),
        sa.Column("limit_micros", sa.BigInteger(), nullable=True),
        sa.Column("allocated_micros", sa.BigInteger(), nullable=True),
        sa.Column("used_micros", sa.BigInteger(), nullable=False),
        sa.Column("reserved_micros", sa.BigInteger(), nullable=False),
        sa.Column("warned_percent", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("used_micros >= 0 AND reserved_micros >= 0", name="ck_account_sums"),
        sa.CheckConstraint(
            "allocated_micros IS NULL OR used_micros + reserved_micros <= allocated_micros", name="ck_account_allocated"
        ),
        sa.PrimaryKeyConstraint("scope", "owner_uuid", "period", "resource"),
    )
    op.create_index("ix_account_period", "account", ["period", "scope", "resource"])
    op.create_table(
        "reservation",
        sa.Column("uuid", sa.Uuid(), nullable=False),
        sa.Column("resource", sa.String(length=20), nullable=False),
        sa.Column("project_uuid", sa.Uuid(), nullable=False),
        sa.Column("machine_uuid", sa.Uuid(), nullable=True),
        sa.Column("period", sa.String(length=10), nullable=False),
        sa.Column("reserved_micros", sa.BigInteger(), nullable=False),
        sa.Column("used_micros", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("reserved_micros >= 0 AND used_micros >= 0", name="ck_reservation_sums"),
        sa.PrimaryKeyConstraint("uuid", "resource"),
    )
    op.create_index("ix_reservation_machine_uuid", "reservation", ["machine_uuid"])
    op.create_index("ix_reservation_project_uuid", "reservation", ["project_uuid"])
    op.create_table(
        "ledger_entry",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.String(length=10), nullable=False),
        sa.Column("reservation_uuid", sa.Uuid(), nullable=False),
        sa.Column("project_uuid", sa.Uuid(), nullable=False),
        sa.Column("machine_uuid", sa.Uuid(), nullable=True),
        sa.Column("period", sa.String(length=10), nullable=False),
        sa.Column("resource", sa.String(length=20), nullable=False),
        sa.Column("amount_micros", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=True),
        sa.Column("note", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key", "resource", name="uq_ledger_entry_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_ledger_entry_created_at", "ledger_entry", ["created_at"])
    op.create_index("ix_ledger_entry_machine_uuid", "ledger_entry", ["machine_uuid"])
    op.create_index("ix_ledger_entry_project_period", "ledger_entry", ["project_uuid", "period"])
    op.create_index("ix_ledger_entry_reservation_uuid", "ledger_entry", ["reservation_uuid"])
    for column in (
        sa.Column("estimate", sa.JSON(), nullable=True),
        sa.Column("reservation_uuid", sa.Uuid(), nullable=True),
        sa.Column("price_micros", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("metered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("blocked", sa.JSON(), nullable=True),
    ):
        op.add_column("machine", column)
    # Machines that run already have neither price nor reservation; the mark is for hub.adoption to find them by.
    op.execute("UPDATE machine SET price_micros = -1 WHERE ended_at IS NULL")
    op.create_index("ix_machine_ended_at", "machine", ["ended_at"])
    op.create_index("ix_machine_project_status", "machine", ["project_uuid", "status"])
    op.create_index("ix_machine_project_spawned_at", "machine", ["project_uuid", "spawned_at"])
    op.create_index("ix_machine_project_ended_at", "machine", ["project_uuid", "ended_at"])
