"""Plain words that probes make their items of."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words(
    "Anna Boris Clara David Emma Felix Grace Henry Irene Jacob Karen Lucas Maria Nathan Olivia Peter Rosa "
    "Samuel Tina Walter"
)
LAST = _words(
    "Adams Baker Carter Dixon Evans Foster Green Hughes Irving Jones King Lopez Mason Nolan Owens Parker "
    "Reed Stone Turner Young"
)
CITIES = _words(
    "Paris London Rome Madrid Berlin Vienna Dublin Oslo Cairo Tokyo Lima Boston Chicago Denver Athens Warsaw "
    "Sydney Toronto Mumbai Prague"
)
THINGS = _words("lamp book chair clock violin kite boat camera drum map puzzle ring hammer basket bell")
