"""The parts of a Winograd convolution as ONNX functions, which training/exchange/winograd.py calls and then inlines.

A map's pixels are rows of channels: `[N H W + 1, C]` in the map's order or, behind a convolution, `[17 T, C]` in that
of its outputs, 4 x 4 places in a tile and then its T tiles by image, row and column. What follows the last pixel is
zeros, and where a window leaves the map it reads those. `windows` are the numbers of the rows that each tile reads,
`[6, 6, N, tall, wide]`; `everywhere`, `[N, H, W]`, those of the map. `shape` is the map's, `[N, C, H, W]`.
"""

from collections.abc import Iterator

import onnx
import onnx.parser

DOMAIN = "winograd"
FUNCTIONS = """
pixels_of_map (image) => (rows) {
    channels_last = Transpose<perm=[0,2,3,1]>(image)
    channels = Shape<start=1,end=2>(image)
    any = Constant<value_ints=[-1]>()
    sizes = Concat<axis=0>(any, channels)
    flat = Reshape(channels_last, sizes)
    one_after = Constant<value_ints=[0,0,1,0]>()
    rows = Pad(flat, one_after)
}
map_of_tiles (rows, everywhere) => (image) {
    channels_last = Gather(rows, everywhere)
    image = Transpose<perm=[0,3,1,2]>(channels_last)
}
convolution (rows, windows, weights, of_inputs, of_outputs) => (outputs) {
    any = Constant<value_ints=[-1]>()
    thirty_six = Constant<value_ints=[36]>()
    flat = Concat<axis=0>(thirty_six, any)
    num_in = Shape<start=1,end=2>(weights)
    num_out = Shape<start=2,end=3>(weights)
    by_tile = Concat<axis=0>(flat, num_in)
    as_rows = Concat<axis=0>(any, num_out)
    gathered = Gather(rows, windows)
    gathered_flat = Reshape(gathered, flat)
    inputs_flat = MatMul(of_inputs, gathered_flat)
    inputs = Reshape(inputs_flat, by_tile)
    products = MatMul(inputs, weights)
    products_flat = Reshape(products, flat)
    outputs_flat = MatMul(of_outputs, products_flat)
    outputs = Reshape(outputs_flat, as_rows)
}
biased (rows, bias) => (sums) {
    seventeen = Constant<value_ints=[17,-1]>()
    channels = Shape<start=2,end=3>(bias)
    by_output = Concat<axis=0>(seventeen, channels)
    outputs = Reshape(rows, by_output)
    sum = Add(outputs, bias)
    sizes = Shape(rows)
    sums = Reshape(sum, sizes)
}
windows_of_map (shape) => (numbers) {
    y, x = winograd.window_positions(shape)
    of_y, of_x, of_image, none = winograd.places_in_map(shape, y, x)
    numbers = winograd.numbers(shape, y, x, of_y, of_x, of_image, none)
}
windows_of_tiles (shape) => (numbers) {
    y, x = winograd.window_positions(shape)
    of_y, of_x, of_image, none = winograd.places_in_tiles(shape, y, x)
    numbers = winograd.numbers(shape, y, x, of_y, of_x, of_image, none)
}
everywhere_of_tiles (shape) => (numbers) {
    zero = Constant<value_int=0>()
    one = Constant<value_int=1>()
    n, height, width = winograd.sides(shape)
    row = Range(zero, height, one)
    after = Constant<value_ints=[1]>()
    y = Unsqueeze(row, after)
    x = Range(zero, width, one)
    of_y, of_x, of_image, none = winograd.places_in_tiles(shape, y, x)
    numbers = winograd.numbers(shape, y, x, of_y, of_x, of_image, none)
}
sides (shape) => (n, height, width) {
    first = Constant<value_int=0>()
    third = Constant<value_int=2>()
    fourth = Constant<value_int=3>()
    n = Gather(shape, first)
    height = Gather(shape, third)
    width = Gather(shape, fourth)
}
tiles_of (side) => (tiles) {
    three = Constant<value_int=3>()
    four = Constant<value_int=4>()
    more = Add(side, three)
    tiles = Div(more, four)
}
window_positions (shape) => (y, x) {
    n, height, width = winograd.sides(shape)
    row = winograd.window_positions_along(height)
    column = winograd.window_positions_along(width)
    of_y = Constant<value_ints=[1,2,4]>()
    of_x = Constant<value_ints=[1,2]>()
    y = Unsqueeze(row, of_y)
    x = Unsqueeze(column, of_x)
}
window_positions_along (side) => (positions) {
    zero = Constant<value_int=0>()
    one = Constant<value_int=1>()
    four = Constant<value_int=4>()
    count = winograd.tiles_of(side)
    tile = Range(zero, count, one)
    start = Mul(tile, four)
    offsets = Constant<value = int64[6,1] {-1, 0, 1, 2, 3, 4}>()
    positions = Add(start, offsets)
}
places_in_map (shape, y, x) => (of_y, of_x, of_image, none) {
    n, height, width = winograd.sides(shape)
    of_y = Mul(y, width)
    of_x = Identity(x)
    of_image = Mul(height, width)
    none = Mul(n, of_image)
}
places_in_tiles (shape, y, x) => (of_y, of_x, of_image, none) {
    n, height, width = winograd.sides(shape)
    tall = winograd.tiles_of(height)
    wide = winograd.tiles_of(width)
    of_image = Mul(tall, wide)
    tiles = Mul(n, of_image)
    four = Constant<value_int=4>()
    sixteen = Constant<value_int=16>()
    none = Mul(tiles, sixteen)
    y_tile = Div(y, four)
    y_in_tile = Mod(y, four)
    x_tile = Div(x, four)
    x_in_tile = Mod(x, four)
    y_tiles_before = Mul(y_tile, wide)
    line = Mul(y_in_tile, four)
    line_before = Mul(line, tiles)
    of_y = Add(line_before, y_tiles_before)
    column_before = Mul(x_in_tile, tiles)
    of_x = Add(column_before, x_tile)
}
numbers (shape, y, x, of_y, of_x, of_image, none) => (numbers) {
    n, height, width = winograd.sides(shape)
    zero = Constant<value_int=0>()
    one = Constant<value_int=1>()
    image = Range(zero, n, one)
    before = Mul(image, of_image)
    apart = Constant<value_ints=[1,2]>()
    of_n = Unsqueeze(before, apart)
    from_y = winograd.inside(y, height, of_y, none)
    from_x = winograd.inside(x, width, of_x, none)
    in_image = Add(from_y, from_x)
    sum = Add(in_image, of_n)
    numbers = Min(sum, none)
}
inside (position, side, place, none) => (result) {
    zero = Constant<value_int=0>()
    is_after = GreaterOrEqual(position, zero)
    is_before = Less(position, side)
    is_inside = And(is_after, is_before)
    result = Where(is_inside, place, none)
}
"""


def functions(version: int) -> Iterator[onnx.FunctionProto]:
    """Yield them, in operators of this version of ONNX."""
    imports = f'<domain: "{DOMAIN}", opset_import: ["" : {version}, "{DOMAIN}" : 1]>'
    for text in FUNCTIONS.strip().split("\n}\n"):
        yield onnx.parser.parse_function(f"{imports}\n{text.removesuffix('}')}\n}}")
