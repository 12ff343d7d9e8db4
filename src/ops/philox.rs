pub fn philox4x32(k: [u32; 2], c: [u32; 4]) -> [u32; 4] {
    let _ = k;
    c
}
