"""Fill class names into prompt templates: class names x templates -> sentences.

The start of the text side; `tokenizer` takes the sentences. Pure text: no
files, no tokens, no model.
"""

import re
from collections.abc import Iterable, Sequence

from actionclip.errors import InputError, short

TEMPLATES: dict[str, tuple[str, ...]] = {
    # The 16 templates of ActionCLIP's code, in its order. The paper says 18; two are not public.
    "actionclip": (
        "a photo of action {}",
        "a picture of action {}",
        "Human action of {}",
        "{}, an action",
        "{} this is an action",
        "{}, a video of action",
        "Playing action of {}",
        "{}",
        "Playing a kind of action, {}",
        "Doing a kind of action, {}",
        "Look, the human is {}",
        "Can you recognize the action of {}?",
        "Video classification of {}",
        "A video of {}",
        "The man is {}",
        "The woman is {}",
    ),
    # "Only label" in Table 3 of the paper.
    "none": ("{}",),
}


def fill_templates(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Fill every class name into every template.

    Args:
        templates: P templates, each with exactly one `{}`.
        class_names: K class names.

    Returns:
        P * K prompts, template-major: the prompt of template p and class k is at p * K + k.

    Raises:
        InputError: if there is no template, or one has no `{}` or several.
    """
    if not templates:
        raise InputError("no prompt template given; use at least one, such as '{}'")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(
                f"template {short(template)} has {template.count('{}')} places for the class name; "
                "write {} exactly once"
            )
    # Not str.format: other braces, in a template or in a name, are text.
    return [template.replace("{}", name) for template in templates for name in class_names]


def class_prompts(
    templates: Sequence[str], class_names: Sequence[str], *, raw_labels: bool
) -> list[str]:
    """Fill class names into templates, see `fill_templates`, as words unless `raw_labels`."""
    names = class_names if raw_labels else [readable(name) for name in class_names]
    return fill_templates(templates, names)


def readable(name: str) -> str:
    """Return a class name as a sentence would say it.

    Splits names written as one word, "ApplyEyeMakeup" and "brush_hair", which the text encoder
    would read as fragments. A name with spaces is returned as it is.
    """
    if any(character.isspace() for character in name):
        return name
    words = _split_camel_case(name.replace("_", " ")).split()
    return " ".join(words) or name


def _split_camel_case(text: str) -> str:
    """Put a space between a small and a capital letter, and before the last of several: TV Show."""
    if text.isascii():
        return re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    # Imported here, because it would take longer than all else that a plain name needs.
    import regex

    border = r"(?<=\p{Ll})(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})"
    return str(regex.sub(border, " ", text))


def comparison_key(name: str) -> str:
    """Return what class names share that differ only in case, underscores and spacing."""
    return " ".join(readable(name).replace("_", " ").casefold().split())


def check_class_names(names: Iterable[str]) -> list[str]:
    """Return the class names as a list, unchanged, after checking them.

    Raises:
        InputError: if there are none, if one is blank, or if two read the same apart from case,
            underscores and spacing.
    """
    if isinstance(names, str):
        raise InputError(f"class names {short(names)} are one string; pass a list of strings")
    names = list(names)
    if not names:
        raise InputError("no class names given; name at least one action")
    seen: dict[str, str] = {}
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise InputError(f"class name {i} is of type {type(name).__name__}; pass strings only")
        if any(0xD800 <= ord(character) < 0xE000 for character in name):
            problem = f"class name {i} ({short(name)}) is not valid text"
            raise InputError(f"{problem}; use a UTF-8 locale")
        if not name.strip():
            raise InputError(f"class name {i} is blank ({short(name)}); remove it or write a name")
        key = comparison_key(name)
        if key in seen:
            raise InputError(
                f"class names {short(seen[key])} and {short(name)} read the same; keep one of them"
            )
        seen[key] = name
    return names
