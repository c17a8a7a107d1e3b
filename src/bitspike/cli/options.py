"""What several commands are told in the same words."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Data = Annotated[Path | None, Parameter(name="--data", env_var="BITSPIKE_DATA")]
Settings = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=False, show_default=False)]
JsonFile = Annotated[Path | None, Parameter(name="--json")]
#: an option of one word that may be repeated
Words = Annotated[tuple[str, ...], Parameter(consume_multiple=False, show_default=False)]


def read_settings(settings: tuple[str, ...]) -> dict[str, str]:
    """("epochs=2", ..) of --set -> {"epochs": "2", ..}; the last of a field holds. Errors: RecipeError for no field=value."""
    from bitspike.recipe import RecipeError

    values: dict[str, str] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise RecipeError(f"--set {setting}: expected field=value, for example --set epochs=2.")
        values[field.strip()] = value.strip()
    return values
