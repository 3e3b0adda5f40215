"""The settings: names, types, defaults, documentation and checks. ``config`` reads them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from cached import setting_checks as check

_T = TypeVar("_T")


def _setting(default: _T, doc: str, right: check.Check = check.anything) -> _T:
    """A field with its documentation and check; typed as its default so that the class body stays readable."""
    made: _T = field(default=default, metadata={"doc": doc, "check": right})
    return made


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """The process: its socket, folders and logs."""

    socket: str = _setting(
        "",
        "Unix socket to serve on. Empty: /run/cached/cached.sock for root or where that folder is writable, else "
        "$XDG_RUNTIME_DIR/cached/cached.sock, else /tmp/cached-UID/cached.sock.",
        check.socket,
    )
    state_dir: str = _setting(
        "",
        "Folder of what outlives a restart. Empty: what systemd gives, else /var/lib/cached for root, else "
        "$XDG_STATE_HOME/cached or ~/.local/state/cached.",
        check.path,
    )
    catalog: str = _setting("", "Catalog file (JSON or TOML), read again when it changes. Empty: none.", check.path)
    models_dir: str = _setting(
        "", "Where the directory view of resident models is kept. Empty: models/ beside the socket.", check.path
    )
    log_level: str = _setting("info", "Least severe level to log.", check.choice("debug", "info", "warning", "error"))
    log_format: str = _setting(
        "auto", "auto: console on a terminal, else json.", check.choice("auto", "json", "console")
    )
    reflection: bool = _setting(False, "Serve gRPC reflection, for tools such as grpcurl.")
    drain_timeout_s: float = _setting(
        20.0, "How long a stopping daemon waits for loads that are under way.", check.between(0, 3600)
    )
    restart_grace_s: float = _setting(
        10.0, "How long leases of an earlier daemon are waited for before anything is evicted.", check.between(0, 3600)
    )


@dataclass(frozen=True, slots=True)
class L1Config:
    """L1, POSIX shared memory."""

    capacity: str = _setting("50%", "Budget of L1: a size, or a share of the host's memory.", check.capacity)
    path: str = _setting(
        "/dev/shm",  # noqa: S108 where shm_open(3) keeps its objects
        "Where segments are: /dev/shm, or a folder on a tmpfs of L1's own, with its own size and huge pages.",
        check.filled_path,
    )
    memory_reserve_bytes: str = _setting("2GiB", "Available memory that L1 leaves to others in any case.", check.size)
    require_huge_pages: bool = _setting(
        False, "Refuse to start where the mount of l1.path gives no huge pages. Where it does, they are always used."
    )
    pool_bytes: str = _setting(
        "auto", "Memory of evicted segments that is kept for the next load: auto, or a size.", check.size_or_auto
    )
    pool_reserve_bytes: str = _setting(
        "auto",
        "Memory that is allocated ahead for the next load, part of pool_bytes: auto (an eighth of L1, 64GiB at most), "
        "or a size.",
        check.size_or_auto,
    )
    hot_capacity: str = _setting(
        "80%", "What hot models may take of L1 together: a size, or a share of it.", check.capacity
    )
    free_ahead: str = _setting(
        "2%",
        "What is kept free ahead of need, by evicting in the background: a size, or a share of L1.",
        check.capacity,
    )
    transient_capacity: str = _setting(
        "25%",
        "Memory beside the budget, where the host has it, for loads that are not worth another model's place: they go "
        "with their last lease. A size, or a share of L1.",
        check.capacity,
    )
    segment_mode: str = _setting("0600", "Mode of segments, octal.", check.mode)
    segment_group: str = _setting("", "Group of segments. Empty: the daemon's own.")


@dataclass(frozen=True, slots=True)
class L2Config:
    """L2, local NVMe."""

    enabled: bool = _setting(True, "Keep models on local disk.")
    path: str = _setting("", "Folder of L2. Empty: l2/ in the state folder.", check.path)
    paths: tuple[str, ...] = _setting(
        (), "Instead of path: folders on several drives, over which models are spread file by file.", check.paths
    )
    capacity: str = _setting("80%", "Budget of L2: a size, or a share of its file systems.", check.capacity)
    seed_dirs: tuple[str, ...] = _setting(
        (),
        "Folders that `cached pull --standalone` filled, or folders of such: read instead of the origin.",
        check.paths,
    )

    @property
    def folders(self) -> tuple[str, ...]:
        """Where L2 is: one folder, or one a drive."""
        return self.paths or (self.path,)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What stays where, beyond what the catalog and `cached tier` say."""

    time_zone: str = _setting(
        "UTC",
        "Time zone of hot windows that name none, and of the habits that predictions are made from.",
        check.time_zone,
    )
    predict: str = _setting(
        "auto",
        "Bring models to L1 that are used at this time of day as a rule, where there is room. auto: only while most "
        "predictions come true. off: habits are not even learned.",
        check.choice("auto", "on", "off"),
    )


@dataclass(frozen=True, slots=True)
class ScrubConfig:
    """Scrubbing: what lies in L1 and L2 is read again in the background, and mended where it is damaged."""

    bytes_per_s: str = _setting(
        "64MB",
        "Bytes read again in a second at most, of both levels together, while anything is due. 64MB take about 1 % of "
        "a core. 0: off.",
        check.size,
    )
    l1_period_s: float = _setting(
        86400.0, "What is in L1 is looked at again after so long.", check.between(0.1, 366 * 86400)
    )
    l2_period_s: float = _setting(
        7 * 86400.0, "What is in L2 is looked at again after so long.", check.between(0.1, 366 * 86400)
    )


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Movement between an origin and the levels."""

    movers: int = _setting(0, "Mover processes. 0: one a core, at most 4.", check.between(0, 64))
    threads_per_mover: int = _setting(
        4, "Threads of each mover for local work: disk, memory, checksums.", check.between(1, 64)
    )
    max_ranges: int = _setting(
        128,
        "Ranges in flight from one origin at most. How many there are is found by measuring its throughput.",
        check.between(1, 1024),
    )
    hedging: bool = _setting(True, "Fetch a range that stalls a second time, over another connection.")
    nice: int = _setting(
        10,
        "Niceness of movers and their sessions, so that bytes never starve the control plane.",
        check.between(0, 19),
    )
    retry_budget_s: float = _setting(
        120.0, "How long one range may be tried again before its load fails.", check.between(0, 86400)
    )
    max_attempts: int = _setting(6, "How often one range is tried at most.", check.between(1, 100))
    idle_timeout_s: float = _setting(30.0, "How long an idle mover lives.", check.between(0, 86400))
    max_concurrent_loads: int = _setting(
        4, "Models that are loaded at the same time; others wait.", check.between(1, 256)
    )


@dataclass(frozen=True, slots=True)
class S3Config:
    """Defaults of s3:// origins; the catalog may set each per model. Credentials come from the usual AWS places."""

    endpoint_url: str = _setting("", "Endpoint of a store other than AWS (MinIO, Ceph, …).", check.url)
    region: str = _setting("", "Region. Empty: what the AWS environment says, else us-east-1.")
    profile: str = _setting("", "Profile of the AWS configuration files.")
    anonymous: bool = _setting(False, "Send unsigned requests, for public buckets.")
    addressing: str = _setting(
        "auto", "Bucket in the path or in the host name.", check.choice("auto", "path", "virtual")
    )
    ca_bundle: str = _setting("", "File of certificate authorities to trust. Empty: the system's.", check.path)
    connect_timeout_s: float = _setting(5.0, "How long a connection may take to be made.", check.between(0.1, 600))
    read_timeout_s: float = _setting(20.0, "How long an answer may stay silent.", check.between(0.1, 3600))
    max_connections: int = _setting(
        0, "Idle connections that each mover keeps to one endpoint. 0: as many as it has used.", check.between(0, 1024)
    )


@dataclass(frozen=True, slots=True)
class HubConfig:
    """Defaults of hf:// origins; the catalog may set each per model. Tokens: see docs/origins.md."""

    endpoint: str = _setting(
        "", "Hugging Face-compatible endpoint. Empty: HF_ENDPOINT, else the public hub.", check.url
    )
    token_file: str = _setting(
        "", "File that holds the token for the endpoint. Empty: HF_TOKEN and Hugging Face's own places.", check.path
    )
    ca_bundle: str = _setting("", "File of certificate authorities to trust. Empty: the system's.", check.path)
    connect_timeout_s: float = _setting(5.0, "How long a connection may take to be made.", check.between(0.1, 600))
    read_timeout_s: float = _setting(20.0, "How long an answer may stay silent.", check.between(0.1, 3600))


@dataclass(frozen=True, slots=True)
class ArtifactsConfig:
    """Compile artifacts: caches of torch.compile, Triton, vLLM and their like, shared between workers and hosts."""

    save: bool = _setting(
        False,
        "Let workers save them. What one saves is code that others run, so this is for hosts whose workers trust each "
        "other; who may is who may fetch descriptors (access.uids, access.gids).",
    )
    destination: str = _setting(
        "",
        "Where saved ones are uploaded to and missing ones looked for: s3://BUCKET/PREFIX or file:///FOLDER. Empty: "
        "they stay on this host.",
        check.destination,
    )
    max_size: str = _setting("4GiB", "The largest that is saved or brought.", check.size)


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """Many hosts at once: when pulls that nobody waits for begin, and what Kubernetes is told. See docs/scale.md."""

    jitter_s: float = _setting(
        0.0,
        "A pull that nobody waits for (a hot model, a window, a time, a resume) begins after a random share of this.",
        check.between(0, 86400),
    )
    slots: int = _setting(
        0,
        "Hosts of the cluster that pull at the same time where nobody waits for it, by Lease objects of Kubernetes "
        "(cached-pull-0 and so on). 0: no bound.",
        check.between(0, 1000),
    )
    node_labels: bool = _setting(False, "Label this node of a Kubernetes cluster with the models that are ready on it.")
    node_name: str = _setting("", "This node's name in the cluster. Empty: the host's name.")
    namespace: str = _setting("", "Namespace of the Lease objects. Empty: the pod's, else default.")
    label_prefix: str = _setting(
        "models.cached.local",
        "Labels are PREFIX/NAME for models in memory or on disk, and l1.PREFIX/NAME besides for those in memory.",
        check.label_prefix,
    )


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Metrics, health and the status page."""

    listen: str = _setting("127.0.0.1:9470", "HOST:PORT to serve HTTP on. Empty: off.", check.listen)


@dataclass(frozen=True, slots=True)
class TcpConfig:
    """gRPC over TCP for operators on other machines, always with mutual TLS; see docs/security.md."""

    listen: str = _setting("", "HOST:PORT to serve gRPC on, beside the socket. Empty: off.", check.listen)
    cert: str = _setting(
        "", "File of the daemon's certificate, and those between it and its authority (PEM).", check.path
    )
    key: str = _setting("", "File of its private key (PEM), which others must not be able to read.", check.path)
    client_ca: str = _setting("", "File of the authorities whose certificates clients may show (PEM).", check.path)
    clients: tuple[str, ...] = _setting(
        (),
        "Names in certificates of clients that may look: list, show, stats, events. Case counts, and there are no "
        "patterns.",
    )
    operators: tuple[str, ...] = _setting(
        (), "Names in certificates of clients that may do everything besides: pull, evict, set tiers, remove."
    )


@dataclass(frozen=True, slots=True)
class CatalogConfig:
    """What a catalog must be to be taken; the file itself is ``daemon.catalog``."""

    public_keys: tuple[str, ...] = _setting(
        (),
        "Files of public keys (PEM, as `cached catalog keygen` makes them). With any, a catalog must be signed with "
        "one of them, in the file CATALOG.sig beside it; needs the extra ``cached[sign]``. Empty: signatures are not "
        "looked at.",
        check.paths,
    )


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """Traces of pulls and attaches for an OpenTelemetry collector; needs the extra ``cached[otel]``."""

    otlp_endpoint: str = _setting(
        "",
        "URL of a collector that speaks OTLP over gRPC, such as http://127.0.0.1:4317. Empty: "
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT; without them no traces are sent.",
        check.url,
    )


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may use the daemon."""

    uids: tuple[int, ...] = _setting(
        (),
        "Users who may use models that the catalog gives no list of their own. With gids empty too: all who open the "
        "socket.",
        check.ids,
    )
    gids: tuple[int, ...] = _setting((), "Groups whose members may, likewise.", check.ids)
    operator_uids: tuple[int, ...] = _setting(
        (),
        "Users who may do everything (evict, remove, set tiers, name sources) and see every model, beside root and the "
        "daemon's own. While nobody is named, and the catalog has no access lists: whoever uids and gids let in.",
        check.ids,
    )
    operator_gids: tuple[int, ...] = _setting((), "Groups whose members may do everything, likewise.", check.ids)
    socket_mode: str = _setting("0660", "Mode of the sockets, octal.", check.mode)
    socket_group: str = _setting("", "Group of the sockets. Empty: the daemon's own.")


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What one user may have at the same time, so that nobody takes the daemon from the others."""

    connections_per_uid: int = _setting(4096, "Connections to the socket.", check.between(1, 65536))
    calls_per_uid: int = _setting(
        6144, "Calls, leases among them. All users together have 8192.", check.between(1, 8192)
    )
    leases_per_uid: int = _setting(4096, "Leases.", check.between(1, 8192))
    streams_per_uid: int = _setting(
        1024, "Calls that go on for long and are no leases: pulls, watches, verifications.", check.between(1, 8192)
    )
    descriptor_connections_per_uid: int = _setting(
        1024, "Connections to the descriptor socket, which workers leave at once.", check.between(1, 4096)
    )
    message_size: str = _setting("1MiB", "The largest message that is taken from anybody.", check.message_size)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings. ``load_config`` leaves no path empty but ``daemon.catalog``, those of origins and, of L2, one."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    l1: L1Config = field(default_factory=L1Config)
    l2: L2Config = field(default_factory=L2Config)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    scrub: ScrubConfig = field(default_factory=ScrubConfig)
    s3: S3Config = field(default_factory=S3Config)
    hf: HubConfig = field(default_factory=HubConfig)
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    tcp: TcpConfig = field(default_factory=TcpConfig)
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, for documentation. ``default`` is its TOML text, ``type`` a word for people."""

    key: str
    type: str
    default: str
    doc: str

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return "CACHED_" + self.key.replace(".", "_").upper()


TYPE_WORDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "whole number",
    float: "number",
    tuple[int, ...]: "list of whole numbers",
    tuple[str, ...]: "list of texts",
}
"""What each type of setting is called for people."""


def describe_settings() -> Iterator[Setting]:
    """Every setting, in the order of the file."""
    for section, kind in sections().items():
        hints = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            yield Setting(
                key=f"{section}.{item.name}",
                type=TYPE_WORDS[hints[item.name]],
                default=toml_text(item.default),
                doc=item.metadata["doc"],
            )


def origin_options(section: S3Config | HubConfig) -> dict[str, str]:
    """The settings of a kind of origin as the plain-text options of an OriginSpec; empty ones are left out."""
    options = {item.name: getattr(section, item.name) for item in dataclasses.fields(section)}
    return {key: plain_text(value) for key, value in options.items() if value not in ("", False)}


def origin_defaults(config: Config) -> dict[str, dict[str, str]]:
    """Of each scheme that has settings, its options."""
    return {"s3": origin_options(config.s3), "hf": origin_options(config.hf)}


def sections() -> dict[str, type]:
    """Section name → its dataclass, in the order of the file."""
    return dict(get_type_hints(Config))


def setting_type(section: str, name: str) -> Any:
    """The Python type of a setting: a key of TYPE_WORDS."""
    return get_type_hints(sections()[section])[name]


def plain_text(value: object) -> str:
    """A value as an environment variable or an origin option holds it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def toml_text(value: object) -> str:
    """A value as the file holds it."""
    if isinstance(value, str):
        return json.dumps(value)
    return f"[{', '.join(map(toml_text, value))}]" if isinstance(value, tuple) else plain_text(value)
