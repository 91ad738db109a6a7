"""What all blocks of the config share."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Block(BaseModel):
    """Unknown keys are refused, values cannot be changed in place, rules between fields are lines of text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        errors = self.cross_field_errors()
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def cross_field_errors(self) -> list[str]:
        """Lines of the rules between fields that are broken; each begins with the setting's name in this block."""
        return []


def tuple_of(value: object) -> object:
    """One string stands for a list of one."""
    return (value,) if isinstance(value, str) else value
