"""Names for slots: what homes are full of, and made-up names that nobody can know. Called by the others of this folder.

Every list is cut in two by lot: names that training may use, and names that only the held-out sentences have.
"""

from __future__ import annotations

import functools
import hashlib
import random

AREAS = """kitchen, living room, bedroom, bathroom, hall, hallway, office, study, garage, basement, attic,
dining room, guest room, kids room, nursery, garden, patio, terrace, balcony, pantry, laundry
room, utility room, cellar, den, lounge, front yard, back yard, porch, front porch,
conservatory, sun room, gym, workshop, shed, library, playroom, game room, media room, master
bedroom, master bath, spare room, stairs, staircase, landing, entrance, entryway, foyer,
corridor, closet, walk in closet, wardrobe, driveway, carport, pool, pool house, sauna,
greenhouse, bar, breakfast nook, mud room, music room, craft room, sewing room, server room, tv
room, drawing room, family room, great room, sitting room, powder room, guest bath, ensuite,
wine cellar, boiler room, storage room, loft, studio, home office, kids bathroom, teenager's
room, anna's room, tom's bedroom, emma's room, grandma's room, dad's office, mom's study, baby
room, deck, veranda, courtyard, barn, stable, chicken coop, dressing room, library corner,
reading corner, hobby room, darkroom, annex, granny flat, boathouse, roof terrace, winter
garden, bike shed, root cellar, elevator, lobby, meeting room, break room, reception"""
FLOORS = """upstairs, downstairs, ground floor, first floor, second floor, third floor, top floor, main floor, lower
floor, main level, upper level, mezzanine, fourth floor, street level"""
# Kinds of devices by Home Assistant's domains, as people name them.
DEVICES = {
    "light": """desk lamp, ceiling light, floor lamp, bedside lamp, night light, reading light, chandelier, led
strip, spotlights, fairy lights, christmas lights, table lamp, pendant light, wall lights,
counter lights, under cabinet lights, lava lamp, mirror light, porch light, flood light, string
lights, lantern, corner lamp, tv backlight, island lights, stair lights, closet light, shower
light, path lights, tree lights, sconce, uplighter, disco lights, standing lamp, piano lamp, hue
bulb, accent light, vanity lights, track lights, work light, salt lamp, moon lamp, garden spots,
festoon, aquarium light""",
    "switch": """coffee maker, kettle, smart plug, plug, socket, heater, space heater, fountain, sprinkler,
irrigation, towel warmer, electric blanket, dehumidifier, humidifier, air purifier, washing
machine, dryer, dishwasher, oven, toaster, microwave, printer, router, aquarium pump, water
heater, boiler, doorbell, siren, christmas tree, power strip, extension cord, soldering station,
amplifier, projector, game console, computer, freezer, charger, car charger, pond pump, garden
pump, rice cooker, slow cooker, air fryer, wemo, outlet""",
    "fan": """ceiling fan, fan, extractor fan, bathroom fan, exhaust fan, tower fan, desk fan, range hood,
ventilator, box fan, pedestal fan, attic fan, ventilation""",
    "cover": """blinds, curtains, shutters, garage door, gate, awning, roller blind, shades, front gate, left
blind, right curtain, patio shutters, skylight, roller shutter, drapes, venetian blinds, side
gate, sun shade, window, driveway gate, pergola roof, sun sail, barn door, screen door, garage,
roof window""",
    "lock": """front door, back door, side door, main door, patio door, garage side door, cellar door, door,
shed door, front gate lock, smart lock, deadbolt, gun safe, wine cabinet, mailbox, terrace door,
entry door""",
    "climate": """heating, thermostat, air conditioning, ac, air conditioner, radiator, heat pump, floor heating,
nest, hvac, climate control, underfloor heating, panel heater""",
    "media_player": """tv, speaker, speakers, stereo, radio, kitchen speaker, sonos, soundbar, apple tv, chromecast,
google home, echo, hi fi, receiver, boombox, homepod, record player, shield, television,
bluetooth speaker, alexa, surround system""",
    "vacuum": """vacuum, roomba, robot, robot vacuum, vacuum cleaner, hoover, robovac, mop robot, deebot, dusty,
rosie, mopping robot, dustin, cleaning robot""",
    "lawn_mower": "mower, lawn mower, robot mower, mowbot, shaun the sheep",
    "scene": """movie night, good night, romantic, party, relax, dinner, reading, sunset, focus, morning,
bedtime, cozy, bright, cinema, away, work, rainbow, cleaning, energize, concentrate, candle
light, game night, date night, christmas, wake up, yoga, storm, tropical twilight, forest,
nightlight""",
    "todo": """shopping, to do, grocery, work, packing, wish, chores, party, weekend, school, holiday, hardware
store, birthday, cleaning, christmas, errands, books to read, movies, pharmacy, drugstore,
costco, gift, camping, renovation""",
    "button": """restart, doorbell chime, garage remote, coffee button, panic button, identify, reboot router,
feed the cat""",
    "valve": "water valve, main valve, garden tap, irrigation valve, gas valve, sprinkler valve",
    "weather": """home, london, berlin, the cabin, paris, new york, madrid, amsterdam, the office, sydney, tokyo,
chicago""",
    "sensor": """motion sensor, phone battery, front window, smoke detector, leak sensor, washing machine,
doorbell, mailbox, humidity, power meter, tank level, outdoor thermometer, fridge""",
}  # fmt: skip
COLORS = """red, blue, green, yellow, orange, purple, pink, white, warm white, cold white, cool white,
turquoise, violet, cyan, magenta, teal, lavender, gold, amber, lime, mint, coral, crimson,
indigo, navy, peach, rose, salmon, sky blue, light blue, dark red, daylight, candle light, soft
white, brown, maroon, olive, aqua, fuchsia, ivory, beige, black, royal blue, forest green, hot
pink, pale yellow, deep purple, sunset orange"""
ITEMS = """milk, eggs, bread, butter, apples, bananas, coffee, toilet paper, cheese, pasta, rice, chicken,
tomatoes, onions, potatoes, dish soap, shampoo, batteries, cat food, dog food, orange juice,
yogurt, flour, sugar, salt, olive oil, garlic, carrots, lettuce, cereal, oat milk, light bulbs,
diapers, tissues, paper towels, ice cream, frozen pizza, ground beef, salmon, strawberries,
peanut butter, honey, toothpaste, razor blades, wine, beer, sparkling water, chocolate, birthday
candles, call the dentist, water the plants, pay the rent, clean the gutters, book flights, buy
a present for mom, return the library books, walk the dog, fix the bike, mow the lawn, take out
the trash, renew passport, nails, duct tape, wrapping paper, basil, cucumbers, spinach, tofu,
hummus, tortillas, black beans, lentils, cream cheese, bacon, sausages, tea bags, washing
powder, sponges, trash bags, sun screen, aspirin, band aids, charcoal, firewood, potting soil,
printer paper"""
MESSAGES = """dinner is ready, time for bed, we are leaving in five minutes, come downstairs, the bus is here,
lunch is on the table, please be quiet, the taxi has arrived, breakfast is ready, i'm home,
lights out, the show is starting, who left the door open, clean up your room, grandma is on the
phone, the pizza is here, get your shoes on, movie starts now, don't forget your keys, the
laundry is done"""
MEDIA = """abbey road, bohemian rhapsody, thriller, jazz classics, the beatles, queen, taylor swift,
morning mix, workout, hotel california, kind of blue, daft punk, the office, star wars, the
daily, serial, radiohead, lo fi beats, dark side of the moon, miles davis, ed sheeran, the
crown, stranger things, mozart, ninth symphony, greatest hits, coldplay, nina simone, summer
hits, planet earth, paw patrol, billie jean, imagine, yellow submarine, johnny cash, adele,
harry potter, the hobbit, hardcore history, this american life, dancing queen, abba, purple
rain, prince, wonderwall, oasis, baby shark, frozen, moana, sleep sounds, rain sounds, nineties
rock, classical piano, david bowie, heroes, metallica, nothing else matters"""
TIMER_NAMES = """pizza, pasta, eggs, tea, laundry, cake, oven, workout, bread, chicken, rice, homework, nap,
break, cookies, roast, coffee, meditation, study, laundry room, game, tv time, plank, steak,
dough, potatoes, soup, dishwasher"""

_STARTS = "bl br ch cl cr d dr f fl fr g gl gr h j k kl l m n p pl pr qu r s sh sl sm sn sp st str t tr v w z".split()
_MIDDLES = "a e i o u ai ea ee oa oo ou er ar or".split()
_ENDS = "b ck d ft g k l ll lm m mp n nd ng nk nt p r rk rn s sh sk st t th x y zz".split()


def lot(text: str, of: int) -> int:
    """The number from 0 to of - 1 that a text draws: always the same one, by its hash."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % of


def is_held_out(name: str) -> bool:
    """Whether a name is kept from training: a sixth of them, by lot."""
    return lot("name" + name, 6) == 0


@functools.cache
def names_of(names: str, held_out: bool) -> list[str]:
    """The part of a list that may be used."""
    return [name for name in split(names) if is_held_out(name) == held_out]


def split(text: str, separator: str = ", ") -> list[str]:
    """The parts of a text over several lines."""
    return " ".join(text.split()).split(separator)


def invented_word(rng: random.Random) -> str:
    """A word of two or so syllables that is in no dictionary."""
    parts = [rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(rng.choice([1, 1, 2]))]
    return "".join(parts) + rng.choice(_ENDS) + rng.choice(["", "", "", "y", "o", "a", "ie"])


def invented_name(rng: random.Random, words: list[str]) -> str:
    """A name of one to three words, made up or put together of words of other names."""
    chance = rng.random()
    if chance < 0.35:
        return invented_word(rng)
    pieces = [rng.choice(words).split(" ")[-1 if i else 0] for i in range(rng.choice([1, 2, 2, 3]))]
    if chance < 0.6:
        pieces[0] = invented_word(rng)
    return " ".join(dict.fromkeys(pieces))
