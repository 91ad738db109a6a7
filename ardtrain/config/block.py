"""What all blocks of the config share."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator


class Block(BaseModel):
    """Unknown keys are refused, values cannot be changed in place, rules between fields are lines of text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: object, info: ValidationInfo) -> object:
        """pydantic alone reads true as 1: `r: yes` would be rank 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("must be a number, not true or false; correct it")
        return value

    @model_validator(mode="after")
    def _rules(self) -> Self:
        errors = self.cross_field_errors()
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def cross_field_errors(self) -> list[str]:
        """Lines of the rules between fields that are broken; each begins with the setting's name in this block."""
        return []


def _kinds(annotation: Any) -> set[Any]:
    """The annotation and all that it is made of."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation) if get_origin(annotation) is not Literal))


def tuple_of(value: object) -> object:
    """One string stands for a list of one."""
    return (value,) if isinstance(value, str) else value
