"""What all v1 shapes are made of: requests and replies, texts, counts, money, pages and the error envelope."""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from autovibe.errors import InvalidRequest
from autovibe.types import Money


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", str_max_length=16 * 1024 * 1024)


class Reply(BaseModel):
    model_config = ConfigDict(from_attributes=True)


def _without_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("A text cannot contain a NUL character.")
    return text


Text = Annotated[str, AfterValidator(_without_nul)]
"""PostgreSQL keeps no NUL in a text, and no prompt needs one."""


def _written_out(value: Any) -> Any:
    """Pydantic takes a number for the seconds since 1970."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?[0-9._]+\s*", value):
        raise ValueError("A date or moment is written as in RFC 3339.")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_written_out)]
Day = Annotated[date, BeforeValidator(_written_out)]

Count = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]

_MOST_MICROS = 10**18


class MoneyAmount(Reply):
    amount: str
    currency: str
    micros: int

    @classmethod
    def of(cls, money: Money) -> MoneyAmount:
        return cls(amount=money.amount, currency=money.currency, micros=money.micros)


def _or_a_number(schema: dict[str, Any]) -> None:
    """Tell in the document that the amount alone will do."""
    whole = dict(schema)
    schema.clear()
    schema |= {"title": whole.pop("title"), "description": whole.pop("description")}
    schema["anyOf"] = [{"type": "number", "minimum": 0}, {"type": "string"}, whole]


class MoneyOrder(Request):
    """Money in a request, as the object that replies carry. `micros`, where given, wins over `amount`."""

    model_config = ConfigDict(json_schema_extra=_or_a_number)

    amount: str | float | None = None
    currency: str | None = Field(
        default=None, pattern=r"^[A-Z]{3}$", description="The Hub's, which is the default: nothing is ever converted."
    )
    micros: int | None = Field(default=None, ge=0, le=_MOST_MICROS, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _accept_a_number(cls, value: Any) -> Any:
        return {"amount": value} if isinstance(value, int | float | str) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _is_money(self) -> MoneyOrder:
        self._counted("")
        return self

    def to_money(self, currency: str) -> Money:
        """In the Hub's currency. Raises InvalidRequest where it was given in another one."""
        if self.currency not in (None, currency):
            raise InvalidRequest(
                f"This Hub counts money in {currency}, not in {self.currency}, and converts nothing; give an amount in "
                f"{currency}.",
                details={"field": "currency", "currency": currency},
            )
        return self._counted(currency)

    def micros_of(self) -> int:
        """Of whatever currency it is."""
        return self._counted("").micros

    def _counted(self, currency: str) -> Money:
        if self.micros is not None:
            return Money(self.micros, currency)
        if self.amount is None:
            raise ValueError("Money takes 'amount' or 'micros'.")
        try:
            money = Money.of(self.amount, currency)
        except ArithmeticError as error:
            raise ValueError(f"'{self.amount}' is no amount of money.") from error
        if money.micros > _MOST_MICROS:
            raise ValueError(f"'{self.amount}' is more money than can be counted.")
        return money


class ErrorBody(Reply):
    code: str
    message: str
    details: dict[str, Any] = {}
    request_id: str
    timestamp: datetime


class ErrorReply(Reply):
    success: Literal[False] = False
    error: ErrorBody


class Page(Reply):
    total_count: int
    has_more: bool
    next_offset: int | None
