from longshort.cli import main


def test_doctor_reports(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "blockwise" in shown


def test_doctor_takes_no_flags(fails):
    assert "doctor takes no flags, got --deep" in fails(2, "doctor", "--deep")
