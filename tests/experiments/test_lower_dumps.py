"""What the compiler dumps, in short files written by hand after real ones."""

import pytest

from experiments.lower.dumps import innermost_loop, read_around, read_cycles, read_schedule, read_vmem_bytes

UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
0 0 0 0 0 1 0 0 0 0
0 0 0 0 0 0 0 1 1 2
1 0 4 0 0 2 1 0 0 0
2 0 3 0 0 0 0 1 1 0
0 0 0 0 0 0 0 0 0 0
1 0 1 0 0 1 1 0 0 0
0 0 0 0 0 1 1 0 0 1
"""
BUNDLES = """= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %14 = vsyncpa [#allocation3], 0 /* copy of
base_bounds: (1, 1)
hlo: descent.1
 */ }
   0x1 LB: > { %9446 = vst [vmem:[#allocation11_spill] sm:$0xff] }
   0x2 LB: >> { %v49_v2 = vmax.f32 %v4603_v0, %v48_v1 }
   0x3   : >> { %p67_p5 = scmp.ge.s32.totalorder %s2061_s24, 2 }
   0x4   :  {}
   0x5   : >> { %v54_v7 = vsub.f32 %v4603_v0, %v53_v6 }
   0x6   : > { %s4607_s0 = sphi %s4676_s0, %s46_s0 }
"""
VMEM_REPORT = """<script>
        // --- 1. THE DATA SOURCE ---
        const DATA ={
  "global_info": {"module_name": "jit_descent", "vmem_capacity": 134217728},
  "hlo_breakdowns": {
    "pad": {"blocks": [], "total_size": 1024},
    "descent.1": {"blocks": [{"block_size": 5129216, "block_type": "SCOPED"}], "total_size": 5129216}
  }
};
        const tbody = document.getElementById('tableBody');
</script>"""


def test_cycles_are_read_and_an_estimate_of_nothing_is_none():
    profile = 'hlo_op_estimate {\n  hlo_op_name: "descent.1"\n  estimated_cycles: 12247\n  num_equivalent_hlos: 1\n}\n'
    assert read_cycles(profile) == 12247
    assert read_cycles(profile.replace("12247", "0")) is None
    assert read_cycles("") is None


PROGRAM = """HloModule jit_f

%body (p: f32[4]) -> f32[4] {
  ROOT %copy.1 = f32[4] copy(%p), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %copy.2 = f32[4] copy(%p), backend_config={"flag_configs":[],"estimated_cycles":"30"}
  %descent.1 = f32[4] custom-call(%copy.2)
  ROOT %copy.3 = f32[4] copy(%descent.1), backend_config={"estimated_cycles":"12"}
}
"""


def test_what_xla_does_around_kernels_is_its_estimate_of_the_whole_program():
    assert read_around(PROGRAM) == 42
    assert read_around(PROGRAM.replace("custom-call(", "while(")) is None
    assert read_around(PROGRAM.replace("custom-call(", "call(")) is None


def test_a_schedule_counts_slots_and_spills_in_the_innermost_loop_and_in_all():
    found = read_schedule(UTILIZATION, BUNDLES)
    assert (found.bundles, found.loop_bundles) == (7, 3)
    assert (found.mxu, found.vpu) == (round(4 / 6, 4), round(8 / 12, 4))
    assert (found.spills, found.loop_spills) == (2, 1)
    assert (found.fills, found.loop_fills) == (3, 2)


def test_of_several_loops_of_one_depth_the_longest_counts():
    bundles = "0 LB: > { a }\n 0x1 LB: > { b }\n 0x2 : > { c }\n 0x3 LB: > { d }\n 0x4 : { e }\n"
    assert innermost_loop(bundles, 5) == [1, 2]


def test_without_a_loop_all_bundles_count():
    assert innermost_loop("     0   :  { a }\n   0x1   :  {}\n", 2) == [0, 1]


def test_files_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="7 bundles are listed and 6 are counted"):
        read_schedule(UTILIZATION.rstrip().rsplit("\n", 1)[0], BUNDLES)


def test_memory_is_that_of_the_operation():
    assert read_vmem_bytes(VMEM_REPORT, "descent.1") == 5129216
