"""The words the model meets: ordinary English, by kind."""

NAMES = tuple(
    """Ada Adam Alba Alex Alice Amir Amy Ana Anna Arun Ben Bella Bob Carla Carlos Chen Clara Dan Dana David Diego
    Ella Emil Emma Eva Felix Finn Fatima Frank Freya George Grace Hana Hugo Ida Igor Ines Iris Ivan Jack James
    Jane Jonas Julia Kai Karim Kate Kenji Lara Lea Leo Lena Liam Lily Lina Lou Lucas Lucy Luis Maja Marco Maria
    Mark Mary Max Maya Mei Mia Mila Mina Nadia Nia Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Pedro Peter
    Pia Priya Rana Ravi Rosa Ruth Sam Sara Sofia Sven Tara Theo Tim Tom Uma Vera Victor Wei Yara Yuki Zara Zoe
    Dimitri Elena Gabriel Hannah Isabel Johanna Katrin Leonard Matthew Natalie Patrick Quentin Rebecca Samuel
    Thomas Ursula Vincent William Xenia""".split()
)
ANIMALS = tuple(
    """ant badger bat bear beaver bee bird butterfly camel cat chicken cow crab crow deer dog dolphin donkey dove
    dragon duck eagle elephant fish fox frog giraffe goat goose hamster hedgehog hen horse kangaroo kitten koala
    lamb lion lizard llama mole monkey moose mouse octopus otter owl panda parrot penguin pig pony puppy rabbit
    raccoon raven seal sheep snail snake spider squirrel swan tiger turtle whale wolf zebra""".split()
)
COLORS = (
    "red",
    "blue",
    "green",
    "yellow",
    "orange",
    "purple",
    "pink",
    "black",
    "white",
    "brown",
    "gray",
    "silver",
    "gold",
)
FOODS = tuple(
    """apple apricot avocado banana bean berry biscuit bread broccoli burger butter cake candy carrot cheese cherry
    chocolate coconut coffee cookie corn cucumber egg fig garlic ginger grape honey jam juice kiwi lemon lettuce
    lime mango melon milk mushroom noodle nut olive onion orange pancake papaya pasta peach pear pepper pie
    pineapple pizza plum popcorn potato pumpkin radish raisin rice salad salt sandwich soup spinach strawberry
    sugar tea toast tomato walnut yogurt""".split()
)
CITIES = tuple(
    """Amsterdam Athens Bangkok Barcelona Beijing Berlin Boston Brussels Budapest Cairo Chicago Copenhagen Dallas
    Delhi Denver Dublin Geneva Hamburg Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Miami
    Milan Montreal Moscow Mumbai Munich Nairobi Naples Oslo Paris Porto Prague Quito Riga Rome Santiago Seattle
    Seoul Shanghai Singapore Stockholm Sydney Tokyo Toronto Vienna Warsaw Zurich""".split()
)
PLACES = tuple(
    """forest garden village river lake mountain meadow beach island castle farm valley market harbor desert cave
    hill park library school town bridge mill field""".split()
)
THINGS = tuple(
    """ball bag basket bell bench bicycle blanket boat book bottle box broom brush bucket button camera candle car
    card chair clock coat coin comb computer crown cup curtain desk door drum fan feather flag flute fork glass
    glove guitar hammer hat helmet house jacket jar kettle key kite knife ladder lamp lantern leaf letter map
    mirror mug nail needle notebook paint pan paper pen pencil phone piano picture pillow plate pot puzzle radio
    ring robot rocket rope ruler scarf scissors shell ship shirt shoe shovel sock sofa spoon stamp star stone
    string sweater sword table tent ticket torch towel toy train tree truck trumpet umbrella vase violin wagon
    wallet watch wheel whistle window""".split()
)
ADJECTIVES = tuple(
    """able angry big bold brave bright broad busy calm careful cheap cheerful clean clever cold cool curious dark
    deep dry dusty eager early easy empty fair fast fine fresh friendly full funny gentle giant glad good grand
    great happy hard heavy honest hot huge humble hungry jolly kind large late lazy light little lively lonely
    long loud lovely lucky merry mild modest narrow neat new nice noisy old patient plain playful polite poor
    pretty proud quick quiet rare rich ripe rough round sad safe sharp shiny short shy silent silly simple
    sleepy slow small smart smooth soft strange strong sunny sweet swift tall tame thick thin tidy tiny tired
    tough warm weak wet wide wild wise young""".split()
)
VERBS = tuple(
    """add ask bake bark begin believe bend blow borrow bounce break bring build buy call carry catch change chase
    cheer choose clap clean climb close collect cook count cover crawl cry cut dance decide dig discover dream
    drink drive drop eat explain fall feed feel fetch fight fill find fix float fly fold follow forget gather
    give go grow guess hear help hide hold hop hope hunt hurry imagine invite join jump keep kick know laugh
    lead learn leave lift listen live look lose love make march measure meet mend move need notice open paint
    pick plan plant play point pour practice promise pull push put race reach read remember repeat rest ride
    ring run sail save search see sell send sew shake share shine shout show sing sit skip sleep slide smell
    smile sneeze speak spell spend stand start stay stop study swim swing take talk taste teach tell thank think
    throw touch travel turn visit wait wake walk wander wash watch wave wear whisper win wish wonder work write
    yawn""".split()
)
OTHERS = tuple(
    """about above across after again air alone also always among answer army art autumn away baby back balance
    bank because bed before below beside best better between beyond birthday bottom brain brother building
    business century chance cheek child circle circus city class cloud club color company corner country couple
    cousin crowd culture danger daughter dinner doctor dollar earth edge effort energy engine evening event ever
    evidence example eye face fact family farmer father favor fever fire flower forever forward freedom friend
    future game gift girl government grass ground group half hand health heart heaven history holiday home hotel
    hour human idea image industry insect instead island job journey judge jungle kingdom kitchen knowledge land
    language law length lesson level life line list logic luck lunch machine magic manager market matter meal
    meaning medicine memory metal middle minute model moment money month moon morning mother motion mouth movie
    music mystery nature neighbor never news night noise nothing number ocean office ordinary outside parent
    party pattern peace people person planet player poem point power present price prince princess problem
    promise property purpose question rain rainbow reason record result rhythm river road rock roof room rule
    sand science sea season second secret sentence shadow shape sister size skill sky snow soldier something
    song sound space speech speed sport spring square stage station steam storm story street student summer sun
    surface surprise system teacher team temple theater thing thought thunder time today together tomorrow tool
    tower trade tradition trip trouble truth uncle under universe value vegetable view village voice wall water
    weather wedding week weight welcome whole wind winter without wizard wonder wood word world year
    yesterday""".split()
)

COMMON_WORDS = tuple(sorted({*ANIMALS, *COLORS, *FOODS, *PLACES, *THINGS, *ADJECTIVES, *VERBS, *OTHERS}))
"""Every lower-case word above, once."""
NOUNS = tuple(sorted({*ANIMALS, *FOODS, *PLACES, *THINGS}))


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"
