"""Tables of series as people write them: dates, columns, and what is wrong with one."""

import numpy as np
import pytest

from mamba_zoo.tasks.series_data import SeriesData, season_of
from mamba_zoo.tasks.series_dates import later_dates, time_marks
from mamba_zoo.tasks.series_files import read_table


@pytest.mark.parametrize(
    ("dates", "step"),
    [
        (["2016-07-01 00:00:00", "2016-07-01 01:00:00"], 3600),
        (["1990/1/1 0:00", "1990/1/2 0:00"], 86_400),
        (["2021-05-01 00:00:00+00:00", "2021-05-01T00:30:00Z"], 1800),
        (["1949-01", "1949-02"], 31 * 86_400),
        (["1991 Jul", "1991 August"], 31 * 86_400),
        (["1970 Q1", "1970-Q2"], 90 * 86_400),
        (["2024-03-31 01:00+01:00", "2024-03-31 04:30:00.5+0200"], 9000),
        (["2024-01-01T23:00:00-05:00", "2024-01-02 05:30 +00:00"], 5400),
        (["20240101", "20240102"], 86_400),
        (["2024010123", "2024010200"], 3600),
        (["1704067200", "1704070800.0"], 3600),
        (["1704067200000", "1704070800000"], 3600),
    ],
)
def test_reads_dates_as_they_are_written(tmp_path, dates, step):
    path = tmp_path / "t.csv"
    path.write_text(f"# a comment\nPeriod,x,y\n{dates[0]},1,\n{dates[1]},2.5,NA\n")
    table = read_table(path)
    assert table.names == ["x", "y"]
    assert table.values[:, 0].tolist() == [1, 2.5]
    assert np.isnan(table.values[:, 1]).all()
    assert table.dates is not None
    assert np.diff(table.dates).astype(np.int64).tolist() == [step]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date,x\n2020-01-01,1\n2020-02,x\n", "'x' in column 'x' is no number"),
        ("date,x\n2020-01-01,1\n2020-13,2\n", "'2020-13' in column 'date' is no date"),
        ("date,x\n31.12.2020,1\n01.01.2021,2\n", "'31.12.2020' in column 'date' is no number and no date such as"),
        ("time,x\n" + "1704067200,1\n" * 10 + "7,2\n", "row 12: '7' in column 'time' is no date"),
        ("date,x\n2020-01-01,1\nyesterday,2\n", "'yesterday' in column 'date' is no date"),
        ("x,y\n1,2\n3\n", "row 3: 1 cells for 2 columns"),
        ("x\n", "no rows below its header"),
        ("2020-01-01,0.5,1\n2020-01-02,1,2\n", "has no header: its first row is 2020-01-01, 0.5, 1"),
        ("7,8\n1,2\n", "has no header: its first row is 7, 8"),
        ("x;y\n1;2\n", "';' between its columns; it needs commas"),
        ("x,x\n1,2\n", "2 columns 'x'; a name for each"),
        ("date,x\n2020-01-02,1\n2020-01-01,2\n", "row 3: '2020-01-01' comes after '2020-01-02'; sort the rows"),
        ("x,y\n1,2\n3,-inf\n", "row 3: the value in column 'y' is infinite"),
    ],
)
def test_says_which_cell_of_a_table_is_wrong(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_reads_the_columns_that_are_asked_for_whatever_the_others_hold(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(",place,0,Label\n1821,inside,1,0\n1822,outside,2,1\n")
    with pytest.raises(ValueError, match="'inside' in column 'place' is no number; leave the column out with columns="):
        read_table(path)
    assert read_table(path, ["0"]).values.tolist() == [[1], [2]]
    assert read_table(path, ["0"], ["label"]).names == ["0", "Label"]
    with pytest.raises(ValueError, match="no column 'x'; it has place, 0"):
        read_table(path, ["x"])
    path.write_text(",0,1\n0,5,6\n1,7,8\n")  # as pandas writes it: the first column numbers the rows
    assert read_table(path).values.tolist() == [[5, 6], [7, 8]]
    path.write_bytes("größe\n1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "names", "first"),
    [
        ("timestamp,value,is_anomaly\n1,5,0\n2,6,1\n3,7,0\n", ["value", "is_anomaly"], None),
        ("when,value,month\n2024-01-01,5,1\n2024-01-02,6,2\n2024-01-03,7,1\n", ["value", "month"], "2024-01-01"),
        ("time,value\n0.5,5\n0.25,6\n", ["time", "value"], None),
        ("month,ds\n3,2024-01-01 00:00+01:00\n3,2024-01-01 01:00+01:00\n", ["month"], "2023-12-31T23"),
        ("hPa,x\n1013.2,1\n1013.1,2\n", ["hPa", "x"], None),
    ],
)
def test_a_column_named_like_dates_may_hold_numbers(tmp_path, text, names, first):
    path = tmp_path / "t.csv"
    path.write_text(text)
    table = read_table(path)
    assert table.names == names
    assert (table.dates is None) == (first is None)
    if table.dates is not None:
        assert table.dates[0] == np.datetime64(first, "s")


def test_the_column_of_dates_can_be_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("time,x,made\n1704067200,1,2020-01-01\n1704070800,2,2020-01-02\n")
    assert read_table(path, ["x"]).dates[0] == np.datetime64("2024-01-01T00", "s")  # type: ignore[index]
    assert read_table(path, ["x"], None, "made").dates[1] == np.datetime64("2020-01-02", "s")  # type: ignore[index]
    bare = read_table(path, ["x", "time"], None, "none")
    assert (bare.names, bare.dates) == (["time", "x"], None)
    assert read_table(path, ["x", "time"]).names == ["time", "x"]
    with pytest.raises(ValueError, match="no column 'y' for date_column; it has time, x, made"):
        SeriesData(str(path), date_column="y").setup()
    with pytest.raises(ValueError, match="row 2: '1' in column 'x' is no date"):
        read_table(path, None, None, "x")


def test_rows_that_are_not_equally_far_apart_are_warned_of(tmp_path):
    path = tmp_path / "t.csv"
    hours = [i + 5 * (i > 60) for i in range(199)]
    for kept in (hours, [h for h in hours if h not in (40, 90)]):
        dates = [np.datetime64("2024-01-01T00:00") + np.timedelta64(h, "h") for h in kept]
        path.write_text("\n".join(["date,x", *(f"{d},1" for d in dates)]))
        if kept is hours:
            read_table(path)  # one gap in 198
    with pytest.warns(UserWarning, match=r"1\.5% of the rows do not come 3600 seconds after the one before"):
        read_table(path)
    path.write_text("\n".join(["date,x", *(f"2024-{month:02},1" for month in range(1, 13))]))
    read_table(path)


def test_marks_and_later_dates():
    dates = np.array(["2016-07-01T00:00:00", "2016-07-03T23:00:00"], dtype="datetime64[s]")
    want = [[0 / 23, 4 / 6, 0 / 30, 182 / 365], [23 / 23, 6 / 6, 2 / 30, 184 / 365]]  # a Friday and a Sunday
    np.testing.assert_allclose(time_marks(dates), np.array(want) - 0.5, atol=1e-6)
    months = np.array(["2019-11-01", "2019-12-01", "2020-01-01"], dtype="datetime64[s]")
    assert [str(d)[:7] for d in later_dates(months, 2)] == ["2020-02", "2020-03"]
    assert season_of(months) == 12
    quarters = np.array(["2019-07", "2019-10", "2020-01", "2020-04"], dtype="datetime64[M]").astype("datetime64[s]")
    assert [str(d)[:7] for d in later_dates(quarters, 2)] == ["2020-07", "2020-10"]
    assert season_of(quarters) == 4
    hours = np.datetime64("2020-01-01T22:00:00") + np.arange(3).astype("timedelta64[h]")
    assert str(later_dates(hours.astype("datetime64[s]"), 1)[0]) == "2020-01-02T01:00:00"
    assert season_of(hours.astype("datetime64[s]")) == 24
