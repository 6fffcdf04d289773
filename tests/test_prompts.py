import pytest

from actionclip.errors import InputError
from actionclip.prompts import TEMPLATES, check_class_names, fill_templates, readable
from actionclip.tokenizer import encode

# The 101 class names of UCF101, in the order of its classInd.txt, as words. The data set itself
# writes them without the spaces.
UCF101 = """
Apply Eye Makeup, Apply Lipstick, Archery, Baby Crawling, Balance Beam, Band Marching,
Baseball Pitch, Basketball, Basketball Dunk, Bench Press, Biking, Billiards, Blow Dry Hair,
Blowing Candles, Body Weight Squats, Bowling, Boxing Punching Bag, Boxing Speed Bag,
Breast Stroke, Brushing Teeth, Clean And Jerk, Cliff Diving, Cricket Bowling, Cricket Shot,
Cutting In Kitchen, Diving, Drumming, Fencing, Field Hockey Penalty, Floor Gymnastics,
Frisbee Catch, Front Crawl, Golf Swing, Haircut, Hammering, Hammer Throw, Handstand Pushups,
Handstand Walking, Head Massage, High Jump, Horse Race, Horse Riding, Hula Hoop, Ice Dancing,
Javelin Throw, Juggling Balls, Jumping Jack, Jump Rope, Kayaking, Knitting, Long Jump, Lunges,
Military Parade, Mixing, Mopping Floor, Nunchucks, Parallel Bars, Pizza Tossing, Playing Cello,
Playing Daf, Playing Dhol, Playing Flute, Playing Guitar, Playing Piano, Playing Sitar,
Playing Tabla, Playing Violin, Pole Vault, Pommel Horse, Pull Ups, Punch, Push Ups, Rafting,
Rock Climbing Indoor, Rope Climbing, Rowing, Salsa Spin, Shaving Beard, Shotput, Skate Boarding,
Skiing, Skijet, Sky Diving, Soccer Juggling, Soccer Penalty, Still Rings, Sumo Wrestling, Surfing,
Swing, Table Tennis Shot, Tai Chi, Tennis Swing, Throw Discus, Trampoline Jumping, Typing,
Uneven Bars, Volleyball Spiking, Walking With Dog, Wall Pushups, Writing On Board, Yo Yo
"""
UCF101_WORDS = [name.strip() for name in UCF101.split(",")]
UCF101_NAMES = [name.replace(" ", "") for name in UCF101_WORDS]


def test_templates_are_those_of_the_code():
    assert TEMPLATES["actionclip"] == (
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
    )
    assert TEMPLATES["none"] == ("{}",)


def test_fill_is_template_major():
    prompts = fill_templates(["a video of {}", "{}!"], ["archery", "tai chi", "diving"])
    assert prompts == [
        "a video of archery",
        "a video of tai chi",
        "a video of diving",
        "archery!",
        "tai chi!",
        "diving!",
    ]


def test_other_braces_are_text():
    assert fill_templates(["{0} {} {name}"], ["a {} b", "{x}"]) == [
        "{0} a {} b {name}",
        "{0} {x} {name}",
    ]


@pytest.mark.parametrize(("template", "count"), [("a video", 0), ("{} and {}", 2), ("{name}", 0)])
def test_template_without_one_place(template, count):
    with pytest.raises(InputError) as error:
        fill_templates(["{}", template], ["archery"])
    assert str(error.value).startswith(f"template {template!r} has {count} places")


def test_no_templates():
    with pytest.raises(InputError, match="no prompt template given"):
        fill_templates([], ["archery"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "Apply Eye Makeup"),
        ("YoYo", "Yo Yo"),
        ("TVShow", "TV Show"),
        ("watchTV", "watch TV"),
        ("brush_hair", "brush hair"),
        ("__brush__hair_", "brush hair"),
        ("passing_American_football_(in_game)", "passing American football (in game)"),
        ("GolfSwing_side", "Golf Swing side"),
        ("ÜbungMachen", "Übung Machen"),
        ("archery", "archery"),
        ("BMX", "BMX"),
        ("playing basketball", "playing basketball"),
        ("Tai Chi Chuan", "Tai Chi Chuan"),
        ("a TVShow with_underscore", "a TVShow with_underscore"),
        ("UCF101", "UCF101"),
        ("打篮球", "打篮球"),
        ("___", "___"),
    ],
)
def test_readable(name, words):
    assert readable(name) == words


def test_readable_on_ucf101():
    assert len(set(UCF101_NAMES)) == 101
    assert [readable(name) for name in UCF101_NAMES] == UCF101_WORDS

    raw = [len(encode(name)) for name in UCF101_NAMES]
    split = [len(encode(readable(name))) for name in UCF101_NAMES]
    words = [len(name.split()) for name in UCF101_WORDS]
    assert (sum(raw), sum(split), sum(words)) == (239, 212, 190)
    # Names of which some word is unknown to the vocabulary as a whole, and so read in fragments.
    assert sum(r > w for r, w in zip(raw, words, strict=True)) == 42
    assert sum(s > w for s, w in zip(split, words, strict=True)) == 18


def test_check_returns_the_names_as_given():
    names = ("ApplyEyeMakeup", " tai chi ", "打篮球")
    assert check_class_names(names) == list(names)
    assert len(check_class_names(UCF101_NAMES)) == 101


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no class names given"),
        (["archery", ""], r"class name 1 is blank \(''\)"),
        ([" \t"], r"class name 0 is blank \(' \\t'\)"),
        (["archery", "archery"], "'archery' and 'archery' read the same"),
        (["TaiChi", "diving", "tai chi"], "'TaiChi' and 'tai chi' read the same"),
        (["tai_chi", "Tai  Chi"], "'tai_chi' and 'Tai  Chi' read the same"),
        (["a_red circle", "a red_circle"], "read the same"),
        (["archery", 3], "class name 1 is of type int"),
        ("archery", "class names 'archery' are one string"),
    ],
)
def test_check_class_names(names, message):
    with pytest.raises(InputError, match=message):
        check_class_names(names)
