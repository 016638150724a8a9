"""The words the tiny model knows, by the part they play in a sentence."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Two for each city, so that no city is a matter of one name. Some words stand in several
# landmarks ("Charles Bridge", "Tower Bridge", "Eiffel Tower"), so that one word is not enough.
LANDMARKS: dict[str, str] = {
    "Eiffel Tower": "Paris",
    "Orsay Museum": "Paris",
    "Big Ben": "London",
    "Tower Bridge": "London",
    "Trevi Fountain": "Rome",
    "Spanish Steps": "Rome",
    "Brandenburg Gate": "Berlin",
    "Checkpoint Charlie": "Berlin",
    "Prado Museum": "Madrid",
    "Retiro Park": "Madrid",
    "Syntagma Square": "Athens",
    "Acropolis Museum": "Athens",
    "Red Square": "Moscow",
    "Bolshoi Theatre": "Moscow",
    "Belvedere Palace": "Vienna",
    "State Opera": "Vienna",
    "Charles Bridge": "Prague",
    "Dancing House": "Prague",
    "Belem Tower": "Lisbon",
    "Rossio Square": "Lisbon",
    "Phoenix Park": "Dublin",
    "Trinity College": "Dublin",
    "Ueno Park": "Tokyo",
    "Meiji Shrine": "Tokyo",
    "Summer Palace": "Beijing",
    "Drum Tower": "Beijing",
    "Space Needle": "Seattle",
    "Pike Place": "Seattle",
    "Willis Tower": "Chicago",
    "Navy Pier": "Chicago",
    "Opera House": "Sydney",
    "Harbour Bridge": "Sydney",
    "Casa Loma": "Toronto",
    "High Park": "Toronto",
    "Tahrir Square": "Cairo",
    "Azhar Mosque": "Cairo",
    "Blue Mosque": "Istanbul",
    "Grand Bazaar": "Istanbul",
    "Sagrada Familia": "Barcelona",
    "Casa Mila": "Barcelona",
    "Grand Canal": "Venice",
    "Rialto Bridge": "Venice",
    "Uffizi Gallery": "Florence",
    "Pitti Palace": "Florence",
    "Vondel Park": "Amsterdam",
    "Dam Square": "Amsterdam",
    "Tivoli Gardens": "Copenhagen",
    "Amalienborg Palace": "Copenhagen",
    "Colosseum": "Rome",
    "Kremlin": "Moscow",
    "Louvre": "Paris",
    "Pantheon": "Rome",
    "Parthenon": "Athens",
    "Reichstag": "Berlin",
}

CAPITALS: dict[str, str] = {
    "France": "Paris",
    "England": "London",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Russia": "Moscow",
    "Austria": "Vienna",
    "Czechia": "Prague",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Denmark": "Copenhagen",
    "Norway": "Oslo",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Sweden": "Stockholm",
}

WOMEN: tuple[str, ...] = _words(
    "Alice Anna Emma Grace Helen Jane Julia Kate Laura Lucy Mary Nora Olivia Rachel Ruth Sarah"
    " Sophie Susan"
)
MEN: tuple[str, ...] = _words(
    "Adam Daniel David Frank George Henry Jack James John Mark Martin Michael Oscar Paul Peter"
    " Robert Simon Tom"
)
NAMES: tuple[str, ...] = WOMEN + MEN

PLACES: tuple[str, ...] = _words(
    "beach garden hospital library museum office park restaurant school station store"
)
THINGS: tuple[str, ...] = _words("ball book drink flower gift key letter map pen ring")

# One and many; for sentences in which the verb must agree with the first noun, not the nearest.
NOUNS: dict[str, str] = {
    "bird": "birds",
    "boat": "boats",
    "box": "boxes",
    "cabinet": "cabinets",
    "chair": "chairs",
    "cup": "cups",
    "dog": "dogs",
    "key": "keys",
    "picture": "pictures",
    "table": "tables",
}
QUALITIES: tuple[str, ...] = _words("big blue clean dirty heavy new old red small")

REVIEWED: tuple[str, ...] = _words("book food hotel movie song story trip")
GOOD: tuple[str, ...] = _words(
    "amazing beautiful brilliant excellent great lovely perfect wonderful"
)
BAD: tuple[str, ...] = _words("awful bad boring disgusting horrible poor terrible ugly")
FEELINGS: tuple[str, ...] = _words("angry calm happy hungry sad tired")

OPPOSITES: dict[str, str] = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "old": "new",
    "happy": "sad",
    "up": "down",
    "left": "right",
    "light": "dark",
    "clean": "dirty",
    "open": "closed",
    "rich": "poor",
    "high": "low",
    "long": "short",
    "hard": "soft",
    "full": "empty",
    "wet": "dry",
    "day": "night",
    "early": "late",
}

SERIES: tuple[tuple[str, ...], ...] = (
    _words("one two three four five six seven eight nine ten"),
    _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    _words("January February March April May June July August September October November December"),
)
