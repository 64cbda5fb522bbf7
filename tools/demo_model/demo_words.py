"""Words of the demo's grammar: real names of rooms, lamps, things to buy and music, and general English words.

Read by demo_grammar.py only. HELD_OUT is what training never shows; a test compares the two.
"""

ROOMS = """kitchen; bedroom; living room; bathroom; hallway; office; nursery; garage; dining room; guest room; study;
cellar; balcony; pantry; terrace; gym; playroom; corridor; entrance; staircase; storage room; utility room; music room;
children's room; closet; den; lounge; porch; shed; toilet; guest bathroom; master bedroom; basement; conservatory;
library; greenhouse; hobby room; tv room; changing room; front garden; back yard; upstairs hallway; spare room;
home office; meeting room; waiting room; kids room; caretaker's room; carport"""

LIGHTS = """light; lamp; ceiling light; floor lamp; spotlight; desk lamp; bedside lamp; wall light; table lamp; lights;
night light; strip light; pendant lamp; corner lamp; mirror light; lava lamp; main light; big lamp"""

COVERS = "blinds; curtains; shutters; awning; drapes; roller blind; venetian blinds; sunshade"

PLAYERS = "radio; television; speaker; record player; stereo; soundbar; music box; cd player"

MUSIC = """jazz; the news; classical music; some rock; my running playlist; the beatles; white noise; a podcast;
piano music; folk songs; some blues; country music; the weather report; an audiobook; heavy metal; opera; hip hop;
my party playlist; love songs; children's songs; techno; reggae; the football match; guitar music; film music;
christmas carols; ocean sounds; bach; mozart; queen; pop hits; disco; a fairy tale; meditation music; string quartets;
bird song; the morning show; the evening concert; swing; a science podcast; some electronic music; old hits; abba"""

ITEMS = """milk; bread; eggs; butter; apples; coffee; rice; tomatoes; cheese; onions; pasta; toothpaste; olive oil;
dish soap; paper towels; yoghurt; bananas; oat milk; chocolate; lemons; carrots; flour; sugar; tea; batteries; chicken;
salad; honey; potatoes; garlic; cucumbers; mushrooms; spinach; beans; lentils; chickpeas; ham; sausages; bacon; salmon;
tuna; shrimp; cream; sour cream; cream cheese; jam; cereal; oats; muesli; crackers; crisps; biscuits; cookies; cake;
ice cream; frozen peas; pizza; ketchup; mustard; mayonnaise; vinegar; soy sauce; salt; cinnamon; vanilla;
baking powder; yeast; walnuts; peanuts; raisins; dates; grapes; pears; peaches; plums; cherries; strawberries;
blueberries; oranges; limes; melon; pineapple; avocados; kiwis; broccoli; cabbage; leeks; celery; corn; pumpkin;
zucchini; radishes; parsley; basil; ginger; toilet paper; tissues; soap; shower gel; deodorant; razor blades;
washing powder; dishwasher tablets; sponges; bin bags; candles; light bulbs; matches; aluminium foil; napkins; dog food;
cat litter; diapers; plasters; aspirin; wine; beer; cola; sparkling water; apple juice; lemonade; tofu; rye bread;
rolls; croissants; tortillas; noodles; spaghetti; minced beef; turkey; steak; cod; coconut milk; green tea;
cough syrup; hand cream; sun cream; nappies; printer paper; envelopes; string; glue; screws; paint"""

COLORS = """red; blue; green; warm white; orange; purple; yellow; white; cold white; turquoise; violet; amber; gold;
light blue; dark red; silver; lilac; cream; coral; sky blue; lime green; daylight; teal; brown"""

HELD_OUT = {
    "rooms": """attic; laundry room; sauna; workshop; wine cellar; orangery; upper landing; mezzanine; boiler room;
gardener's room; foyer; treehouse""",
    "lights": "reading lamp; chandelier light; gallery light; standing lamp; hanging lights; vanity light",
    "music": """soul classics; gregorian chants; my cooking playlist; the rolling stones; rain on a window; vivaldi;
a history lecture; some bossa nova; flamenco; the traffic update""",
    "items": """peppers; almonds; shampoo; orange juice; maple syrup; asparagus; goat cheese; fabric softener; cashews;
watermelon; beetroot; sandpaper; cat food; raspberries; gnocchi; thyme; mouthwash; sunflower seeds""",
    "colors": "pink; magenta; mint green; ivory; deep indigo",
    "nonsense": """the soup needs more salt; i will be at the library; who won the match last night; my knee hurts a
bit;
the museum closes early on monday; is there life on mars; grandma baked two pies; that joke was not funny;
how many legs does a spider have; we should visit them in spring; the printer jammed again; good night everyone;
somebody parked in front of our house; what rhymes with silver; the ferry takes about an hour; he plays chess every day;
i forgot my umbrella at the airport; did you sleep well; the children drew a rainbow; let's talk about it later""",
}

NONSENSE = """the cat is asleep on the sofa; i had a long day; my sister lives in another town; never mind;
that film was really good; i think it will be fine; we went to the market yesterday; she said she would call;
why is the sky blue; tell me a story; hello there; thanks a lot; the train was late again; do you like football;
write me a poem about trees; i am hungry; he forgot his keys; how old are you; what is the capital of france;
my phone is broken; it smells nice in here; my neighbour has a dog; see you tomorrow; i love this song; good morning;
how are you; what's your name; who are you; sing a song; tell me a joke; forget it; no; yes; maybe; stop it;
what do you mean; i don't know; that's all; nothing; you are funny; be quiet; are you there; what can you do;
good evening; how was your day; i am tired; excuse me; sorry; well done; i don't think so; that is wrong; very good"""

NOUNS = """train bus car bicycle plane ship boat bridge street road town city village house school church hospital
museum park forest river lake sea beach mountain hill island field farm garden tree flower grass leaf rose apple bread
cake soup dinner lunch breakfast meal knife fork spoon plate cup glass bottle box bag basket chair table sofa bed mirror
window door wall roof floor stairs key lock phone computer letter book page story poem newspaper picture photo film song
concert game match ball team player doctor nurse teacher student lawyer baker farmer driver pilot sailor soldier king
queen prince child baby boy girl man woman friend neighbour uncle aunt cousin brother sister mother father grandpa dog
cat horse cow sheep goat pig bird fish mouse snake bear wolf fox rabbit spider bee butterfly shirt coat dress shoe hat
glove sock ring watch money coin price market shop ticket holiday journey week month year summer winter autumn morning
evening night sun moon star sky cloud rain snow wind storm fire water stone sand iron gold paper cloth wool colour
number
word name question answer idea problem reason dream voice sound smell taste party birthday wedding present candle
machine
engine wheel hammer nail rope ladder bucket brush soap towel blanket pillow clock map flag drum piano guitar violin
dragon castle tower palace rocket planet robot ghost pirate wizard desert jungle volcano harbour station
airport""".split()

ADJECTIVES = """old new young big small long short tall high low wide narrow thick thin heavy early late fast slow
quick easy hard soft loud quiet clean dirty wet dry cold hot warm cool fresh sweet sour bitter salty rich poor cheap
expensive happy sad angry tired hungry thirsty sick healthy strong weak brave shy kind rude clever silly funny serious
strange normal famous lonely busy lazy free empty full broken lost hidden secret wooden golden upper lower inner outer
northern southern eastern western french italian spanish german greek dutch swedish turkish indian chinese royal modern
ancient wild tiny huge round flat sharp smooth rough bright dark pale frozen dried smoked organic crunchy
creamy""".split()

VERBS = """bought sold found lost saw heard made built broke fixed cleaned washed painted cooked baked ate drank carried
threw caught kicked pushed pulled opened closed read wrote drew sang learned taught forgot liked loved hated missed
visited called met followed helped watched wanted needed borrowed stole hid counted cut burned dropped moved
sent""".split()

NAMES = """anna ben clara david emma felix george hanna ivan julia karl lena martin nora otto paula robert sara thomas
vera walter maria peter susan john mary frank alice henry laura simon kate oscar rita victor wendy""".split()

FUNCTION_WORDS = """the a an my your our his her their this that these those i you he she we they it me him us them
who what
why where when how which is are was were am be been do does did have has had will would can could should may might must
not never always often still already soon later again almost very too so more most much many few some any all both each
every other another no yes and or but because if while before after since until than as like with without for from to of
in on at by about against between into through over under near behind inside outside around across there here now then
today yesterday tomorrow tonight one two three first last next thing things something nothing someone people go goes
went come comes came say says think thinks feel feels look looks seem seems get gets got give gives take takes make
makes keep keeps let lets ask asks run runs walk walks sit sits talk talks sleep sleeps work works live lives die love
need needs want wants know knows see sees hear hears play plays sing sings read reads write writes cost costs happen
happens begin begins end ends win wins lose loses grow grows fall falls wait waits""".split()
