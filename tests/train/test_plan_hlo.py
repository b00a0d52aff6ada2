"""Collectives of a compiled step, read from its HLO text."""

from train.plan.hlo import Traffic, collectives

HLO = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%inner_body (p.0: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p.0 = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.0 = u32[] get-tuple-element(%p.0), index=0
  %two = u32[]{:T(128)} constant(2), metadata={op_name="x(y)"}
  %next.0 = u32[] add(%i.0, %two)
  %x.0 = bf16[8,4]{1,0} get-tuple-element(%p.0), index=1
  %permute = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x.0), channel_id=1
  %permuted = bf16[8,4]{1,0} collective-permute-done(%permute)
  ROOT %out.0 = (u32[], bf16[8,4]) tuple(%next.0, %permuted)
}

%inner_condition (p.1: (u32[], bf16[8,4])) -> pred[] {
  %eight = u32[] constant(8)
  %p.1 = (u32[], bf16[8,4]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  ROOT %less.1 = pred[] compare(%i.1, %eight), direction=LT
}

%body (p.2: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p.2 = (s32[], bf16[8,4]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %one = s32[] constant(1)
  %next.2 = s32[] add(%i.2, %one)
  %x.2 = bf16[8,4] get-tuple-element(%p.2), index=1
  %zero.2 = u32[] constant(0)
  %start.2 = u32[] copy(%zero.2)
  %pair.2 = (u32[], bf16[8,4]) tuple(%start.2, %x.2)
  %loop.2 = (u32[], bf16[8,4]) while(%pair.2), condition=%inner_condition, body=%inner_body
  %y.2 = bf16[8,4] get-tuple-element(%loop.2), index=1
  %gather = bf16[8,16]{1,0} all-gather(%y.2), replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %out.2 = (s32[], bf16[8,4]) tuple(%next.2, %y.2)
}

%condition (p.3: (s32[], bf16[8,4])) -> pred[] {
  %five = s32[] constant(5)
  %p.3 = (s32[], bf16[8,4]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  ROOT %less.3 = pred[] fusion(%i.3, %five), kind=kLoop, calls=%compared
}

%compared (c.0: s32[], c.1: s32[]) -> pred[] {
  %c.0 = s32[] parameter(0)
  %c.1 = s32[] parameter(1)
  ROOT %less.4 = pred[] compare(%c.0, %c.1), direction=LT
}

%data_condition (p.5: (pred[], f32[16])) -> pred[] {
  %p.5 = (pred[], f32[16]) parameter(0)
  ROOT %flag = pred[] get-tuple-element(%p.5), index=0
}

%data_body (p.6: (pred[], f32[16])) -> (pred[], f32[16]) {
  %p.6 = (pred[], f32[16]) parameter(0)
  %flag.6 = pred[] get-tuple-element(%p.6), index=0
  %x.6 = f32[16] get-tuple-element(%p.6), index=1
  %reduced = f32[16]{0} all-reduce(%x.6), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
  ROOT %out.6 = (pred[], f32[16]) tuple(%flag.6, %reduced)
}

%taken (t.0: f32[16]) -> f32[4] {
  %t.0 = f32[16] parameter(0)
  ROOT %scattered = f32[4]{0} reduce-scatter(%t.0), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}

%passed (t.1: f32[4]) -> f32[4] {
  ROOT %t.1 = f32[4] parameter(0)
}

%wrapped (t.2: s8[32]) -> s8[32] {
  %t.2 = s8[32] parameter(0)
  ROOT %exchanged = s8[32] all-to-all(%t.2), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: bf16[8,4], y: f32[16], z: f32[4], flag.7: pred[], s: s8[32]) -> bf16[8,4] {
  %x = bf16[8,4] parameter(0)
  %y = f32[16] parameter(1)
  %z = f32[4] parameter(2)
  %flag.7 = pred[] parameter(3)
  %s = s8[32] parameter(4)
  %two.7 = s32[] constant(2)
  %pair = (s32[], /*index=1*/bf16[8,4]) tuple(%two.7, /*index=1*/%x)
  %loop = (s32[], bf16[8,4]) while(%pair), condition=%condition, body=%body
  %data = (pred[], f32[16]) tuple(%flag.7, %y)
  %until = (pred[], f32[16]) while(%data), condition=%data_condition, body=%data_body
  %either = f32[4] conditional(%flag.7, %y, %z), branch_computations={%taken, %passed}
  %started = ((s8[32]), s8[32], u32[]) async-start(%s), calls=%wrapped
  %done = s8[32] async-done(%started), calls=%wrapped
  ROOT %result = bf16[8,4] get-tuple-element(%loop), index=1
}
"""


def test_collectives_count_loops_through_nesting():
    """Three outer iterations (2 to 5) of four inner ones (0 to 8 by 2); the data-dependent loop, `unknown_trips`."""
    assert collectives(HLO, unknown_trips=7) == {
        "all-gather": Traffic(3, 3 * 256, 3 * 256 * 3 // 4),
        "all-reduce": Traffic(7, 7 * 64, 7 * 2 * 64 * 3 // 4),
        "all-to-all": Traffic(1, 32, 16),
        "collective-permute": Traffic(12, 12 * 64, 12 * 64),
        "reduce-scatter": Traffic(1, 16, 16 * 3),
    }
    known = 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    assert collectives(HLO.replace("body=%body", known))["all-gather"].count == 9
