"""The verbs about catalog files: check them, and sign them."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import click

from cached import signatures
from cached.catalog_file import load_catalog
from cached.cli.output import output_option, print_json, print_table
from cached.errors import ConfigError
from cached.units import format_size


@click.group()
def catalog() -> None:
    """Check catalogs, and sign them."""


@catalog.command("validate")
@click.argument("file", type=click.Path(path_type=Path))
@output_option
def catalog_validate(file: Path, output: str) -> None:
    """Check a catalog file, and name everything that is wrong in it. Needs no daemon.

    Example: cached catalog validate /etc/cached/catalog.json
    """
    models = load_catalog(file).models.values()
    if output == "json":
        print_json([_catalog_data(model) for model in models])
        return
    rows = [
        (
            model.name,
            model.tier or "-",
            format_size(model.size_bytes) if model.size_bytes else "-",
            f"{len(model.sha256)} files" if model.sha256 else "-",
            model.source,
        )
        for model in models
    ]
    print_table(("MODEL", "TIER", "SIZE", "SHA-256", "SOURCE"), rows, right=("SIZE",))
    click.echo(f"\n{file} is valid: {len(rows)} model{'' if len(rows) == 1 else 's'}")


def _catalog_data(model: object) -> dict[str, object]:
    values = {item.name: getattr(model, item.name) for item in fields(model)}  # type: ignore[arg-type]
    return {key: dict(value) if hasattr(value, "items") else value for key, value in values.items()}


@catalog.command("keygen")
@click.argument("file", type=click.Path(path_type=Path))
def catalog_keygen(file: Path) -> None:
    """Make a key for signing catalogs: the private half in FILE, the public half in FILE.pub.

    The private half stays with who signs. Daemons get the public half, by catalog.public_keys.

    Example: cached catalog keygen catalog.key
    """
    private, public, key_id = signatures.generate_key()
    public_file = file.with_name(f"{file.name}.pub")
    for path, data, mode in ((file, private, 0o600), (public_file, public, 0o644)):
        _write_new(path, data, mode)
    click.echo(f"{file}: the private key {key_id}; keep it where catalogs are signed")
    click.echo(
        f'{public_file}: its public half; on each host: [catalog] public_keys = ["/etc/cached/{public_file.name}"]'
    )


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
    except OSError as error:
        hint = "no key is ever overwritten: choose another name, or remove it"
        raise ConfigError(
            f"cannot make {path}: {error.strerror}", hint=hint, file=str(path), key="", value=""
        ) from error


@catalog.command("sign")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--key", "keys", multiple=True, required=True, metavar="FILE",
    help="Private key; several while one takes another's place.",
)  # fmt: skip
def catalog_sign(file: Path, keys: tuple[str, ...]) -> None:
    """Check a catalog, and write its signature beside it, to FILE.sig. Deliver both together.

    Example: cached catalog sign catalog.json --key catalog.key
    """
    read: list[bytes] = []
    load_catalog(file, read.append)
    beside = Path(f"{file}{signatures.SUFFIX}")
    fresh = beside.with_name(f"{beside.name}.new")
    text = signatures.sign(read[0], keys)
    try:
        fresh.write_text(text, encoding="ascii")
        fresh.replace(beside)
    except OSError as error:
        msg = f"cannot write {beside}: {error.strerror}"
        raise ConfigError(msg, hint="sign where you may write", file=str(beside), key="", value="") from error
    click.echo(f"{beside}: signed with {len(keys)} key{'' if len(keys) == 1 else 's'}")


@catalog.command("verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--public-key", "keys", multiple=True, required=True, metavar="FILE", help="One of these must have signed it."
)
@output_option
def catalog_verify(file: Path, keys: tuple[str, ...], output: str) -> None:
    """Check a catalog and its signature, as a daemon with these keys would.

    Example: cached catalog verify catalog.json --public-key catalog.key.pub
    """
    guard, found = signatures.CatalogGuard(keys), []
    models = load_catalog(file, lambda data: found.append(guard.check(str(file), data))).models
    signed = found[0]
    if output == "json":
        print_json({"models": len(models), "key_id": signed.key_id, "signed_at_s": signed.signed_at_s})
        return
    count = f"{len(models)} model{'' if len(models) == 1 else 's'}"
    click.echo(f"{file} is valid ({count}), and signed by {signed.key_id} at {signed.at}")
