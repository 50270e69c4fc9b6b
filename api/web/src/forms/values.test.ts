// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { describe, expect, it } from 'vitest';

import type { Params } from '../api/schema';
import { fieldsFor } from '../guest/KeyDialog';
import { checkFields, fieldParam, placeErrors, toParameters } from './values';

const PARAMS: Params = {
  vmid: { type: 'integer', minimum: 100, maximum: 999_999_999, format: 'pve-vmid' },
  hostname: { type: 'string', format: 'dns-name', optional: 1 },
  cores: { type: 'integer', minimum: 1, maximum: 64, optional: 1 },
  memory: { type: 'string', optional: 1, default_key: 'current', format: { current: { type: 'integer', minimum: 16 } } },
  rootfs: { type: 'string', optional: 1, default_key: 'volume', format: { volume: { type: 'string' }, acl: { type: 'boolean', optional: 1 }, size: { type: 'string', format: 'disk-size', optional: 1 } } },
  'net[n]': {
    type: 'string',
    optional: 1,
    count: 32,
    default_key: 'model',
    format: { model: { type: 'string', enum: ['virtio', 'e1000'] }, macaddr: { type: 'string', format: 'mac-addr', optional: 1 }, bridge: { type: 'string', optional: 1 } },
  },
};

describe('fields to parameters', () => {
  it('joins the keys of a property string, bare key first, and leaves empty fields out', () => {
    const values = { vmid: '101', hostname: '', 'net0.bridge': 'vmbr0', 'net0.model': 'virtio', 'net0.macaddr': '' };
    expect(toParameters(PARAMS, values)).toEqual({ vmid: '101', net0: 'virtio,bridge=vmbr0' });
  });

  it('writes a volume to be allocated as STORAGE:GIB beside its other keys', () => {
    expect(toParameters(PARAMS, { 'rootfs:storage': 'local', 'rootfs:size': '4', 'rootfs.acl': '1' })).toEqual({ rootfs: 'local:4,acl=1' });
  });

  it('does not allocate without a storage', () => {
    expect(toParameters(PARAMS, { 'rootfs:size': '4' })).toEqual({});
  });
});

describe('checks by the schema', () => {
  it('names what is wrong with each field', () => {
    const values = { vmid: '99', hostname: 'not a name', cores: '0.5', 'net0.macaddr': '01:00:00:00:00:00' };
    expect(Object.keys(checkFields(PARAMS, Object.keys(values), values))).toEqual(['vmid', 'hostname', 'cores', 'net0.macaddr']);
  });

  it('asks for what the form needs even where the API does not', () => {
    expect(checkFields(PARAMS, ['rootfs:storage'], {}, new Set(['rootfs:storage']))).toHaveProperty('rootfs:storage');
    expect(checkFields(PARAMS, ['net0.model'], {})).toEqual({});
  });

  it('checks a property string shown as one field by its bare key', () => {
    expect(fieldParam(PARAMS, 'memory')?.minimum).toBe(16);
    expect(checkFields(PARAMS, ['memory'], { memory: '8' })).toEqual({ memory: 'At least 16.' });
  });

  it('has no field that the API does not know', () => {
    expect(fieldParam(PARAMS, 'net0.nonsense')).toBeUndefined();
    expect(fieldParam(PARAMS, 'virtio0:storage')).toBeUndefined();
  });
});

describe('errors of the server', () => {
  it('come to the field of the same parameter, and keep their name when there is none', () => {
    const placed = placeErrors({ net0: 'no such bridge', vmid: 'taken', digest: 'changed' }, ['vmid', 'net0.bridge']);
    expect(placed).toEqual({ 'net0.bridge': 'no such bridge', vmid: 'taken', digest: 'changed' });
  });
});

describe('fields of a key being edited', () => {
  it('keeps what the form does not show', () => {
    const { names, values } = fieldsFor('rootfs', PARAMS['rootfs']!, 'local:101/vm-101-disk-0.raw,size=4G,shared=1');
    expect(names).not.toContain('rootfs.volume');
    expect(toParameters(PARAMS, { ...values, 'rootfs.acl': '1' })['rootfs']).toBe('local:101/vm-101-disk-0.raw,size=4G,shared=1,acl=1');
  });

  it('understands the short form of a network device', () => {
    const { values } = fieldsFor('net0', PARAMS['net[n]']!, 'virtio=BC:24:11:00:00:01,bridge=vmbr0');
    expect(toParameters(PARAMS, { ...values, 'net0.bridge': 'vmbr1' })).toEqual({ net0: 'virtio,macaddr=BC:24:11:00:00:01,bridge=vmbr1' });
  });
});
