"""The readers by the names that a mixture calls them."""

from training.audiotia.captions import AudioCaps, Clotho, Macs, MusicCaps, SongDescriber, WavCaps
from training.audiotia.drawn import Drawn
from training.audiotia.generic import GenericReader
from training.audiotia.label_names import BeijingOpera, CremaD, Gtzan, Ravdess, Sesa, VocalSound
from training.audiotia.label_tables import AudioSet, Dcase17, Esc50, Fsd50k, Tut2017, UrbanSound8k, VggSound
from training.audiotia.questions import ClothoAqa, MusicQa, OpenAqa
from training.audiotia.reader import Reader

READERS: dict[str, type[Reader]] = {
    "audiocaps": AudioCaps,
    "clotho": Clotho,
    "wavcaps": WavCaps,
    "macs": Macs,
    "musiccaps": MusicCaps,
    "song_describer": SongDescriber,
    "openaqa": OpenAqa,
    "musicqa": MusicQa,
    "clothoaqa": ClothoAqa,
    "audioset": AudioSet,
    "fsd50k": Fsd50k,
    "vggsound": VggSound,
    "urbansound8k": UrbanSound8k,
    "esc50": Esc50,
    "dcase17": Dcase17,
    "tut2017": Tut2017,
    "sesa": Sesa,
    "vocalsound": VocalSound,
    "crema_d": CremaD,
    "ravdess": Ravdess,
    "gtzan": Gtzan,
    "beijing_opera": BeijingOpera,
    "csv": GenericReader,
    "drawn": Drawn,
}

__all__ = ["READERS"]
