"""What the overview draws: figures of the server over time, as SVG in which everything is text."""

from xml.etree import ElementTree

from siderolink.common.pb.siderolink.admin.v1 import Machine, ServerStatus
from siderolink.web.plots import HEIGHT, WIDTH, Line, plot
from siderolink.web.sampling import KEPT, MachineTraffic, Sampler, rates, sample_of


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def points(path: str) -> list[list[tuple[float, float]]]:
    """The pieces of a line."""
    pieces: list[list[tuple[float, float]]] = []
    for part in path.replace("M", "|M").replace("L", "|L").split("|")[1:]:
        if part[0] == "M":
            pieces.append([])
        x, y = part[1:].split()
        pieces[-1].append((float(x), float(y)))
    return pieces


def test_lines_over_time_stay_inside_and_break_where_nothing_is_known() -> None:
    times = [1000.0 + 5 * number for number in range(6)]
    figure = plot("p", "Machines", times, [Line("up", [0, 3, None, 7, 7, 7]), Line("down", [None] * 6)], "{:.0f} up".format)
    root = drawn(figure)
    up, down = root.findall(".//path")
    pieces = points(up.get("d", ""))
    assert [len(piece) for piece in pieces] == [2, 3]
    assert points(down.get("d", "")) == []
    found = [point for piece in pieces for point in piece]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in found)
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert pieces[0][0][1] > pieces[0][1][1] > pieces[1][0][1] == pieces[1][-1][1], "more is higher"
    scale = [text.text for text in root.findall(".//text")]
    assert scale[:3] == ["0 up", "5 up", "10 up"]
    assert scale[3:] == ["00:16:40", "00:16:52", "00:17:05 UTC"]
    assert ["".join(item.itertext()).strip() for item in root.findall(".//li")] == ["up 7 up", "down"]


def test_a_plot_without_figures_says_so_and_hostile_names_are_text() -> None:
    markup = "<script>alert(1)</script>\"'"
    for times in ([], [1.0], [1.0, 2.0], [1.0, 1.0]):
        root = drawn(plot("p", markup, times, [Line(markup, [0.0] * len(times))], lambda value: markup))
        assert root.findall(".//script") == []
        assert root.findtext(".//title") == markup
        assert ("first figures" in "".join(root.itertext())) == (len(times) < 2)


def test_rates_are_known_where_a_counter_went_on() -> None:
    assert rates([0.0, 5.0, 10.0, 10.0, 15.0], [100, 150, 20, 30, 40]) == [None, 10.0, None, None, 2.0]


def test_what_is_kept_of_the_past_is_bounded() -> None:
    status = ServerStatus(
        links={"up": 5, "down": 2, "pending": 1}, machines={"pending": 3, "denied": 1}, refusals={"a": 2, "b": 3}, sent_bytes=9
    )
    sampler = Sampler(lambda: None)
    for number in range(KEPT + 5):
        sampler.samples.append(sample_of(status, float(number), 4))
    assert len(sampler.samples) == KEPT
    last = sampler.samples[-1]
    assert (last.up, last.down, last.waiting, last.kept_out, last.joins, last.refusals) == (5, 2, 1, 4, 4, 5)
    traffic = MachineTraffic()
    for number in range(1000):
        one = traffic.note(Machine(id="busy", received_bytes=number), float(number))
        traffic.note(Machine(id=f"m{number}"), float(number))
    assert (len(one), one[-1]) == (400, (999.0, 999, 0))
    assert list(traffic.note(Machine(id="m1"), 5000.0)) == [(5000.0, 0, 0)], "those looked at the longest ago are forgotten"
