"""Penn Treebank tokens of captions, as coco-caption's Java tokeniser gives them, without Java.

Caption scores can be compared on the same tokens only: on Clotho, human against human, CIDEr-D is .845 on these and
.660 on words as they stand. coco-caption runs Stanford CoreNLP 3.4.1 (`PTBTokenizer -preserveLines -lowerCase`) and
then drops punctuation. The rules here were found by asking that program about captions, abbreviations and odd
spellings; `tests/test_metrics_ptb.py` asks it again where there is Java. Two things differ on purpose: a caption's
tokens do not depend on the caption after it (Java reads on to see whether "in A." ends a sentence), and no token holds
a space ("1 1/2", telephone numbers, markup).
"""

import re
from collections.abc import Iterator
from functools import lru_cache

# What results name. The number changes with any change of tokens.
TOKENIZER = "ptb-python-1"
# coco-caption's list, in the forms that can occur. Brackets stay, as `-lrb-`: its list has them in capitals only.
PUNCTUATION = re.compile(r"--+|[-\u2013-\u2015]|\.|\.\.\.+|\u2026|''|``|[\"'`\u2018\u2019“”«»?!,:;]")
REPLACED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "¢": "cents",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
}
SMILEY_PARENTHESES = re.compile("[()]")
SUFFIX_APOSTROPHE = re.compile(r"\u2019(?=(?:[smdt]|re|ve|ll)$)")

# Words that a full stop belongs to, always or before a number.
ABBREVIATIONS = (
    "adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|cie|cmdr|co|col|"
    "colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|gov|govs|hon|"
    "inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kan|kans|ky|lieut|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|"
    "mont|mr|mrs|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|ph\\.d|plc|ppte|ppty|pres|prof|profs|pte|ptes|pty|"
    "ptys|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|ste|supt|sys|tel|tenn|thu|thurs|treas|tue|tues|"
    "univ|va|vs|vt|wed|wis|wisc|wm|wyo"
)
ABBREVIATIONS_OF_NUMBERS = "art|ca|figs?|nos?|op|pp|prop"
# Words that begin a sentence, so that the full stop of a single letter before them ends one.
SENTENCE_STARTS = (
    "a|about|according|additionally|after|an|as|at|but|earlier|he|her|here|however|if|in|it|last|many|more|now|once|one|"
    "other|our|she|since|so|some|such|that|the|their|then|there|these|they|this|we|what|when|while|yet|you"
)
EXTENSIONS = (
    "bat|bmp|c|class|cgi|cpp|dll|doc|docx|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|"
    "wav|x|xml|zip"
)

_LETTER, _ALNUM, _APOSTROPHE = r"[^\W\d_]", r"[^\W_]", r"['\u2019]"
_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"  # "rain.The" is one word
_INITIALS = r"[a-z](?:\.[a-z])+"
_SUFFIX = "(?:[msd]|re|ve|ll)"
_HYPHENATED = "[a-z0-9]+(?:-[a-z]+){0,2}"
_CAPITALISED_STARTS = "|".join(f"{word.capitalize()}|{word.upper()}" for word in SENTENCE_STARTS.split("|"))
_IN_ADDRESS = r"[^\s\"<>|(){}@]"

# At each place the longest match wins, and of equals the first. Where a rule has a group, that is the token; what
# follows it in the match counts towards the length alone.
RULES = tuple(
    re.compile(rule)
    for rule in (
        # contractions
        "(?i:(can)not|(gon)na|(got)ta|(gim)me|(lem)me|(wan)na)",
        rf"(?i:({_APOSTROPHE}t)(?:is|was))",
        rf"(?i:([a-z]*[a-mo-z])n{_APOSTROPHE}t)",
        rf"(?i:n{_APOSTROPHE}t(?![a-z]))",
        rf"(?i:({_WORD}){_APOSTROPHE}{_SUFFIX})",
        rf"(?i:{_APOSTROPHE}{_SUFFIX}(?![a-z])|\u2019{_SUFFIX})",
        # words with an apostrophe of their own
        rf"(?i:[doln]{_APOSTROPHE}{_LETTER}{_ALNUM}*|[ldjy]{_APOSTROPHE}|(?:ol|somethin){_APOSTROPHE})",
        rf"(?i:c{_APOSTROPHE}mon|ma{_APOSTROPHE}am|{_APOSTROPHE}em|{_APOSTROPHE}n(?:{_APOSTROPHE}|(?![a-z0-9])))",
        rf"(?i:{_APOSTROPHE}[2-9]0s|{_APOSTROPHE}[0-9]{{2}}(?![a-z0-9]))",
        # words, and full stops that belong to them
        _WORD,
        rf"(?i:(?:{ABBREVIATIONS}|{_INITIALS})\.)",
        rf"(?i:((?:{ABBREVIATIONS_OF_NUMBERS})\.)\s*[0-9])",
        rf"[A-Za-z]\.(?!\s+(?:{_CAPITALISED_STARTS})(?:\s|$))",
        rf"({_ALNUM}+\.)[,;:]",
        # numbers and compounds
        r"[-+]?(?:[0-9]*(?:[.:,][0-9]+)+|[0-9]+)",
        rf"{_ALNUM}+(?:_{_ALNUM}+)*",
        rf"(?i:{_ALNUM}(?:[.,]|{_ALNUM})*(?:-(?:{_ALNUM}+|{_INITIALS}\.))+)",
        rf"(?i:{_HYPHENATED}(?:\\?/{_HYPHENATED}){{1,2}})",
        r"[A-Z]+(?:[+&][A-Z]+)+|[cC]\+\+|[cCfF]#|[A-Z]+\$",
        # files and addresses
        rf"(?i:{_ALNUM}+\.(?:{EXTENSIONS})(?!{_ALNUM}))",
        r"(?i:(?:https?://|www\.)[^\s\"<>|(){}]*[^\s\"<>|.!?(){},-])",
        rf"[A-Za-z0-9]{_IN_ADDRESS}*@(?:[^\s\"<>|(){{}}.]+\.)*[^\s\"<>|(){{}}.]+|@[A-Za-z_]\w*",
        rf"#{_LETTER}{_ALNUM}*",
        r"</?[A-Za-z][^<>\s]*>|&(?:amp|lt|gt);",
        # punctuation and symbols
        r"[<>]?[:;=]['o*-]?[()DPdpO\\{@|\[\]](?![A-Za-z])",
        r"\.\.\.+|[!?]+|--+|``|''|_+|>>|<<",
        r"\S",
    )
)
# Most words of most captions, where no other rule could take more.
PLAIN_WORD = re.compile(r"(?!(?:cannot|gonna|gotta|gimme|lemme|wanna)\b)[a-z]+(?=\s|$)")


@lru_cache(maxsize=2**16)  # references are scored by several metrics
def ptb_tokenize(sentence: str) -> tuple[str, ...]:
    """The tokens of one caption, in lower case and without punctuation; none where there are no words.

    Line breaks are spaces, as in coco-caption.
    """
    return tuple(_written(token) for token in _split(sentence) if not PUNCTUATION.fullmatch(token))


def _split(sentence: str) -> Iterator[str]:
    position = 0
    while position < len(sentence):
        if sentence[position].isspace():
            position += 1
            continue
        match = PLAIN_WORD.match(sentence, position)
        if match is None:
            matches = (rule.match(sentence, position) for rule in RULES)
            match = max((found for found in matches if found is not None), key=lambda found: found.end())
        group = match.lastindex or 0
        yield match.group(group)
        position = match.end(group)


def _written(token: str) -> str:
    """A token as the Penn Treebank writes it, in lower case."""
    if token in REPLACED:
        return REPLACED[token]
    token = SMILEY_PARENTHESES.sub(lambda found: REPLACED[found.group()], token)
    return SUFFIX_APOSTROPHE.sub("'", token).lower()
