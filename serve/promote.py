"""promote and rollback: the verbs that change a registry, each after the bundle has shown that it can answer."""

from seqray.bundle import Bundle
from seqray.config import Config
from seqray.errors import BundleError, ConfigError, DataError
from seqray.folder import Folder
from seqray.recommender import Recommender
from serve.admission import Admission
from serve.registry import Change, Registry, Version
from serve.served_model import ServedModel


def promote(
    registry: Registry, admission: Admission, bundle: str | int, *, challenger: bool = False, why: str = ""
) -> tuple[Version, Change]:
    """Makes a bundle (path or URI, or the number of a version) the champion, or the challenger.

    It is verified as a replica will, and has to rank; BundleError or DataError and nothing changed when it does not
    or when somebody else changed the registry meanwhile.
    """
    head = registry.head()
    if isinstance(bundle, int):
        version = registry.version(bundle)
        _check_ranks(admission.load(registry.bundle(version), version.manifest_sha256))
    else:
        size = admission.num_bytes(bundle)
        loaded = admission.load(bundle)
        _check_ranks(loaded)
        version = registry.add(loaded, size)
    holder = "challenger" if challenger and version.number == head.challenger else "champion"
    if version.number in (head.champion, head.challenger if challenger else None):
        raise DataError(f"{registry.folder}: version {version.number} is the {holder} already")
    change = head.challenged(version.number, why) if challenger else head.promoted(version.number, why)
    registry.change(change)
    return version, change


def rollback(registry: Registry, admission: Admission, why: str = "") -> Change:
    """Makes the champion of before the champion again; said again, the one before that."""
    change = registry.head().rolled_back(why)
    assert change.new is not None
    version = registry.version(change.new)
    _check_ranks(admission.load(registry.bundle(version), version.manifest_sha256))
    registry.change(change)
    return change


def withdraw(registry: Registry, why: str = "") -> Change:
    """Takes the challenger away; DataError where there is none."""
    head = registry.head()
    if head.challenger is None:
        raise DataError(f"{registry.folder}: there is no challenger")
    change = head.challenged(None, why)
    registry.change(change)
    return change


def first_bundle(config: Config) -> tuple[Bundle, int]:
    """The bundle that the replicas of a config with a registry start with, verified, and its version.

    `serve.bundle` becomes version 1 where the registry has no champion yet; a broken champion gives way to the one
    before it, as it does in the replicas. ConfigError or BundleError without any.
    """
    registry, admission = Registry.at(config.serve.registry or ""), Admission.of(config)
    head = registry.head()
    if head.champion is None:
        if config.serve.bundle is None:
            raise ConfigError(
                f"serve.registry: {registry.folder} has no champion; python -m serve promote CONFIG BUNDLE, or name "
                "the first one by serve.bundle"
            )
        bundle = str(Folder.at(config.serve.bundle))
        _, head = promote(registry, admission, bundle, why="serve.bundle of the first start")
    reasons = []
    for number in dict.fromkeys(head.champions):
        version = registry.version(number)
        try:
            return admission.load(registry.bundle(version), version.manifest_sha256), number
        except BundleError as error:
            reasons.append(str(error))
    raise BundleError(f"{registry.folder}: no champion that can answer: {'; '.join(reasons)}")


def named_bundle(config: Config) -> tuple[Bundle, str]:
    """The bundle of `serve.bundle`, verified, and its version; ConfigError without one, BundleError."""
    if config.serve.bundle is None:
        raise ConfigError(
            "serve.bundle: name the bundle, such as serve.bundle=.seqray/bundles/shop/RUN, or a registry by "
            "serve.registry"
        )
    bundle = Admission.of(config).load(str(Folder.at(config.serve.bundle)))
    return bundle, bundle.version


def _check_ranks(bundle: Bundle) -> None:
    ServedModel(Recommender(bundle), bundle.config.name, "champion", 1).warm_up()
